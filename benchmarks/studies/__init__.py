"""Studies: questions of science, answered with several seeds. They are no part of `make test`."""
