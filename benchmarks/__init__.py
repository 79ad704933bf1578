"""Problems and measurements of raco_optim, one question a file. Not in the installed package."""
