"""`raco-optim chat`, `compare` and `soup`: output, saved models, bad input."""

import io
import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from raco_optim.cli import main
from raco_optim.cli.runs import RUN_FILE
from tests.tiny_language_models import tiny_model, tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }} <eos> {% endfor %}"
BETA = 0.5
PROMPTS = ["we show ", "the new model "]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def tokenizer(template=None):
    found = tiny_tokenizer()
    found.chat_template = template
    return found


def save(model, folder, template=None):
    model.save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)


def write_run(folder, start, weights):
    settings = {"weights": weights, "beta": BETA, "loss_type": ["sigmoid"], "method": "raco"}
    about = {"status": "finished", "data_format": "text", "model_path": str(start)}
    run = {**about, "settings": settings, "result": {"evaluation": {}, "training": {}}}
    (folder / RUN_FILE).write_text(json.dumps(run))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, two adapters of it, a model trained from it, and some that do not match it."""
    folder = tmp_path_factory.mktemp("models")
    save(tiny_model(seed=0), folder / "base")
    for seed, name in enumerate(("helpful", "harmless"), start=1):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        options = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
        config = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear", **options)
        save(get_peft_model(base, config), folder / name)
        write_run(folder / name, folder / "base", {name: 1.0, "other": 0.0})
    save(tiny_model(seed=3), folder / "full")
    write_run(folder / "full", folder / "base", {"helpful": 0.7, "harmless": 0.3})
    save(tiny_model(seed=5, layers=3), folder / "deep")
    for name in ("other", "unfinished"):
        save(tiny_model(seed=5), folder / name)
    write_run(folder / "other", "/elsewhere", {"helpful": 1.0})
    (folder / "unfinished" / RUN_FILE).write_text('{"status": "training"}')
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "long.txt").write_text("the " * 100)
    (folder / "other.jsonl").write_text('{"text": "a"}\n')
    return folder


def loaded(folder):
    if (folder / "adapter_config.json").exists():
        base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
        return PeftModel.from_pretrained(base, folder).eval()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def greedy(model, ids, length):
    """The most likely tokens, one after the other."""
    ids = list(ids)
    for _ in range(length):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:  # <eos>
            break
    return ids


@torch.no_grad()
def log_prob(model, ids, start):
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_probs[t - 1, ids[t]]) for t in range(start, len(ids)))


# Chat


def chat(folder, text, monkeypatch, *options):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("latin-1"))))
    return main(["chat", str(folder), "--temperature", "0", "--max_new_tokens", "5", *options])


@pytest.mark.parametrize("name", ["helpful", "full"])
def test_chat_prints_the_most_likely_answers(name, folder, monkeypatch, capsys):
    text = "we show\nthe data\n/reset\nthe data\n/exit\nnever read\n"
    assert chat(folder / name, text, monkeypatch) == 0
    words, model = tokenizer(), loaded(folder / name)
    expected, history = [], []
    for said in ("we show", "the data", None, "the data"):
        if said is None:
            history = []
            continue
        prompt = words("\n".join([*history, said]))["input_ids"]
        answer = words.decode(greedy(model, prompt, 5)[len(prompt) :], skip_special_tokens=True)
        expected.append(answer.strip())
        history += [said, answer.strip()]
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == expected


def test_chat_with_a_template(folder, tmp_path, monkeypatch, capsys):
    save(tiny_model(seed=3), tmp_path, TEMPLATE)
    assert chat(tmp_path, "we show\n", monkeypatch) == 0
    words = tokenizer()
    prompt = words("we show <eos> ")["input_ids"]
    answer = words.decode(
        greedy(loaded(tmp_path), prompt, 5)[len(prompt) :], skip_special_tokens=True
    )
    assert capsys.readouterr().out.strip() == answer.strip()


def test_chat_goes_on_after_an_error(folder, monkeypatch, capsys):
    text = f"/help\n{'the ' * 100}\n\xff\nwe show\n"  # a byte that is no UTF-8, too
    assert chat(folder / "full", text, monkeypatch) == 0
    printed = capsys.readouterr()
    assert "unknown command /help" in printed.err
    assert "fewer than 64, the limit" in printed.err
    assert printed.out.count("\n") == 2


# Compare


def compare(*arguments):
    return main(["compare", *map(str, arguments), "--max_new_tokens", "6"])


def test_answers_and_their_scores(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    shape = tiny_model().config.to_dict() | {"id2label": {0: "score"}, "label2id": {"score": 0}}
    torch.manual_seed(0)
    save(LlamaForSequenceClassification(LlamaConfig(**shape)), "scorer")
    (script := tmp_path / "judge.py").write_text(
        "import json, sys\nfor line in sys.stdin: print(len(json.loads(line)['answer']))"
    )
    judge = f"{sys.executable} {script}"
    page = tmp_path / "page.html"
    options = ["--reward_model", "scorer", "--judge", judge, "--output", page]
    names = ["helpful", "full", "base"]
    assert compare(*names, "--prompts", "prompts.txt", *options) == 0
    printed = capsys.readouterr().out
    words, models = tokenizer(), {name: loaded(folder / name) for name in names}
    classifier = LlamaForSequenceClassification.from_pretrained("scorer").eval()
    for number, prompt in enumerate(PROMPTS, start=1):
        start = words(prompt)["input_ids"]
        answers = [greedy(models[name], start, 6) for name in names]
        texts = [words.decode(ids[len(start) :], skip_special_tokens=True) for ids in answers]

        n = len(start)

        def reward(run, ids, n=n):
            return BETA * (log_prob(models[run], ids, n) - log_prob(models["base"], ids, n))

        with torch.no_grad():
            judged = [
                float(classifier(torch.tensor([words(prompt + text)["input_ids"]])).logits)
                for text in texts
            ]
        expected = {
            "reward of helpful (helpful)": [reward("helpful", ids) for ids in answers],
            "reward of full (helpful 0.7,": [reward("full", ids) for ids in answers],
            "judge ": [float(len(text.strip())) for text in texts],
            "scorer ": judged,
        }
        part = printed.split(f"\n{number + 1}. ")[0].split(f"{number}. {prompt}")[-1]
        for label, values in expected.items():
            line = next(x for x in part.splitlines() if label in x)
            assert [float(x) for x in line.split()[-3:]] == pytest.approx(values, abs=1e-3)
        assert all(" ".join(text.split()) in page.read_text() for text in texts)
    assert "Means over the prompts" in printed
    assert compare(*names, "--prompts", "prompts.txt", "--output", page) == 0, "its own page"


def test_messages_are_prompts_too(folder, tmp_path, capsys):
    save(tiny_model(seed=3), tmp_path / "model", TEMPLATE)
    turns = [{"role": "user", "content": "we show"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": turns, "chosen": "a"}))
    assert compare(tmp_path / "model", "--prompts", tmp_path / "prompts.jsonl") == 0
    prompt = tokenizer()("we show <eos> ")["input_ids"]
    answer = greedy(loaded(tmp_path / "model"), prompt, 6)[len(prompt) :]
    printed = " ".join(capsys.readouterr().out.split())
    assert "1. user: we show" in printed
    assert tokenizer().decode(answer, skip_special_tokens=True).strip() in printed
    assert compare(folder / "base", "--prompts", tmp_path / "prompts.jsonl") == 2
    assert "must have a chat template" in capsys.readouterr().err


def test_a_missing_reference_is_reported(folder, tmp_path, capsys):
    save(tiny_model(seed=3), tmp_path)
    write_run(tmp_path, tmp_path / "gone", {"helpful": 1.0})
    assert compare(tmp_path, "--prompts", folder / "prompts.txt") == 0
    printed = capsys.readouterr()
    assert f"no implicit reward, because {tmp_path / 'gone'} is missing" in printed.err
    assert "reward" not in printed.out


BAD = {
    "no model": (["/nowhere", "--prompts", "prompts.txt"], ["must be a folder", "/nowhere"]),
    "a file": (["prompts.txt", "--prompts", "prompts.txt"], ["must be a folder", "prompts.txt"]),
    "no such hub name": (["no-such/model", "--prompts", "prompts.txt"], ["loading no-such/model"]),
    "no prompts": (["full", "--prompts", "no.txt"], ["`--prompts` no.txt", "No such file"]),
    "empty": (["full", "--prompts", "empty.txt"], ["`--prompts` must hold at least one prompt"]),
    "no column": (["full", "--prompts", "other.jsonl"], ["in `prompt`", "line 1", "None"]),
    "twice": (["full", "full", "--prompts", "prompts.txt"], ["must differ"]),
    "tokens": (["full", "--prompts", "prompts.txt", "--max_new_tokens", "0"], ["at least 1"]),
    "heat": (["full", "--prompts", "prompts.txt", "--temperature", "nan"], ["`--temperature`"]),
    "page": (["full", "--prompts", "prompts.txt", "--output", "other.jsonl"], ["wrote", "another"]),
    "no judge": (["full", "--prompts", "prompts.txt", "--judge", "no-such-command"], ["`--judge`"]),
    "judge": (["full", "--prompts", "prompts.txt", "--judge", "false"], ["exit code 1"]),
    "words": (["full", "--prompts", "prompts.txt", "--judge", "cat"], ["must print 2 numbers"]),
    "long": (["full", "--prompts", "long.txt"], ["fewer than 64, the limit of full; got 100"]),
    "classifier": (["full", "--prompts", "prompts.txt", "--reward_model", "/no"], ["`--reward_mo"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_compare_is_one_line(case, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, fragments = BAD[case]
    assert main(["compare", "--max_new_tokens", "3", *arguments]) == 2
    printed = capsys.readouterr()
    *_, last = printed.err.splitlines()
    assert [f for f in ("raco-optim: ", *fragments) if f not in last] == []
    assert printed.out == ""


@pytest.mark.parametrize("command", ["chat", "align"])
def test_a_name_that_the_hub_does_not_have_is_one_line(command, tmp_path, capsys, monkeypatch):
    """Without a network too, where transformers would try for a minute."""
    import huggingface_hub

    def fails(*_, **__):
        raise ConnectionError("no network\nhere")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fails)
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "a", "chosen": "b", "rejected": "c", "pref_x": 1}\n'
    )
    options = ["--data", "pairs.jsonl", "--weights", "x=1", "--output_dir", "out"]
    asked = ["nowhere"] if command == "chat" else ["--model", "nowhere", *options]
    assert main([command, *asked]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "nowhere, which is neither a folder here" in last
    assert "no network" in last


# Soup


@pytest.mark.parametrize("names", [("helpful", "harmless"), ("full", "base")], ids=str)
def test_soup_is_the_average_of_the_weights(names, folder, tmp_path):
    """Adapters are merged first: the average of LoRA's factors is another model."""
    shares = (0.3, 0.7)
    parts = [str(folder / name) for name in names]
    weights = ["--weights", *map(str, shares), "--output_dir", str(tmp_path / "soup")]
    assert main(["soup", *parts, *weights]) == 0
    models = [loaded(folder / name) for name in names]
    models = [m.merge_and_unload() if isinstance(m, PeftModel) else m for m in models]
    states = [model.state_dict() for model in models]
    soup = AutoModelForCausalLM.from_pretrained(tmp_path / "soup").state_dict()
    for name, found in soup.items():
        expected = sum(w * state[name].double() for w, state in zip(shares, states, strict=True))
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    assert AutoTokenizer.from_pretrained(tmp_path / "soup").eos_token == "<eos>"
    start = AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()
    assert any((soup[name] - x).abs().max() > 0.01 for name, x in start.items())


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["full", "base", "--weights", "1"], ["one number per model", "got 1 for full base"]),
        (["full", "full", "--weights", "0.5", "0.5"], ["the models must differ"]),
        (["full", "base", "--weights", "0.5", "0.6"], ["sum to 1"]),
        (["full", "base", "--weights", "0.5", "nan"], ["weights"]),
        (["full", "deep", "--weights", "0.5", "0.5"], ["equal keys"]),
        (["full", "other", "--weights", "0.5", "0.5"], ["from the same model", "elsewhere"]),
        (["full", "unfinished", "--weights", "0.5", "0.5"], ["an unfinished run"]),
        (["full", "base", "--weights", "1", "0", "--output_dir", "base"], ["a new or an empty"]),
    ],
    ids=str,
)
def test_bad_input_of_soup(arguments, fragments, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["soup", "--output_dir", str(tmp_path / "soup"), *arguments]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert [f for f in ("raco-optim: ", *fragments) if f not in last] == []
    assert not (tmp_path / "soup" / "model.safetensors").exists()
