"""Problems and measurements of raco_optim, one question a file. Not in the installed package."""

import os

# Read once, by the first import of torch or transformers.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",  # nothing here comes from a model hub: a look-up could only be a mistake
    "TRANSFORMERS_VERBOSITY": "error",
    # Threads that wait for work sleep instead of spinning on cores that other processes need.
    "OMP_WAIT_POLICY": "PASSIVE",
    # The profiler that counts memory otherwise says when it starts and stops.
    "KINETO_LOG_LEVEL": "99",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # for deterministic algorithms
}
for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
