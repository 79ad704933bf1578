"""Options of the command line that take words of several kinds."""

import pytest

from raco_optim.cli.arguments import parse

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about FSDP as a text

REQUIRED = "--model m --data d --weights a=0.5,b=0.5 --output_dir o --use_cpu true --bf16 false"
# option -> what it sets
OPTIONS = {
    "--fsdp": True,
    "--fsdp true": True,
    "--fsdp=True": True,
    "--fsdp false": False,
    "--fsdp full_shard": True,
    "--include_num_input_tokens_seen": "all",
    "--include_num_input_tokens_seen true": "all",
    "--include_num_input_tokens_seen non_padding": "non_padding",
    "--include_num_input_tokens_seen false": "no",
    "--trackio_static_space_id false": False,
    "--trackio_static_space_id me/space": "me/space",
    "--optim_target_modules all-linear": "all-linear",
    "--optim_target_modules q_proj v_proj": ["q_proj", "v_proj"],
    "--report_to none": [],
    "--report_to wandb tensorboard": ["wandb", "tensorboard"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_several_kinds(option):
    config = parse([*REQUIRED.split(), *option.split()], "raco-optim align").config
    name = option.split()[0].partition("=")[0].removeprefix("--")
    assert getattr(config, name) == OPTIONS[option]
