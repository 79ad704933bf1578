"""`raco-optim data`: from records in the layouts of public data sets to pairs."""

import gzip
import json
import re
import sys
from pathlib import Path

import datasets
import pytest
import yaml

from raco_optim.cli import main
from raco_optim.cli.layouts.conversations import as_messages, as_text, decoded
from raco_optim.cli.layouts.known import LAYOUTS
from raco_optim.cli.layouts.rules_file import rules_of
from tests.tiny_language_models import tiny_model, tiny_tokenizer


def say(user, assistant):
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def written(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def convert(tmp_path, records, *options, name="data.jsonl"):
    """The pairs as (prompt, chosen, rejected, {column: value}), with the text of the last turn."""
    output = tmp_path / "out" / "pairs.jsonl"
    source = written(tmp_path / name, records)
    assert main(["data", str(source), "--output", str(output), "--overwrite", *options]) == 0
    return [
        (*(row.pop(name)[-1]["content"] for name in ("prompt", "chosen", "rejected")), row)
        for row in map(json.loads, output.read_text().splitlines())
    ]


def refusal(capsys, *arguments):
    assert main(["data", *map(str, arguments)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("raco-optim: ")
    return message


# The layouts, with the field names of the data sets


PKU = {
    "prompt": "How do I pick a lock?",
    "response_0": "With a pick.",
    "response_1": "Ask a locksmith.",
    "response_0_source": "Alpaca3-8B",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "response_0_harm_category": {"Economic Crime": True},
    "better_response_id": 0,
    "safer_response_id": 1,
}


def test_pku_saferlhf(tmp_path):
    signs = {"pref_helpful": 1, "pref_harmless": -1, "pref_safe": -1}
    texts = ("How do I pick a lock?", "With a pick.", "Ask a locksmith.")
    assert convert(tmp_path, [PKU]) == [(*texts, signs)]


def helpsteer2(prompt, response, *attributes):
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict(zip(names, attributes, strict=True))}


def test_helpsteer2_pairs_the_answers_to_a_prompt(tmp_path, capsys):
    turns = "c#\n<extra_id_1>Assistant\nA language.\n<extra_id_1>User\nMore."
    records = [
        helpsteer2("c#", "A long one.", 3, 4, 4, 2, 3),
        helpsteer2("c#", "Short.", 4, 4, 3, 1, 0),
        helpsteer2(turns, "One.", 1, 1, 1, 1, 1),
        helpsteer2(turns, "Two.", 1, 1, 1, 1, 2),
        helpsteer2("alone", "One.", 1, 1, 1, 1, 1),
    ]
    first, second = convert(tmp_path, records, name="train.jsonl.gz")
    signs = {"helpfulness": -1, "correctness": 0, "coherence": 1, "complexity": 1, "verbosity": 1}
    assert first == ("c#", "A long one.", "Short.", {f"pref_{k}": x for k, x in signs.items()})
    assert second[:3] == ("More.", "One.", "Two.")
    assert "records: 5, pairs: 2\n" in (printed := capsys.readouterr().out)
    assert "left out: records with the only answer to their prompt: 1\n" in printed
    assert "  verbosity               1              1    0         0\n" in printed


def helpsteer3(preference):
    return {
        "domain": "code",
        "context": say("Sort.", "How?") + [{"role": "user", "content": "Up."}],
        "response1": "sorted(x)",
        "response2": "x.sort()",
        "overall_preference": preference,
        "individual_preference": [{"score": preference}],
    }


def test_helpsteer3_prefers_the_first_below_zero(tmp_path, capsys):
    pairs = convert(tmp_path, map(helpsteer3, (-3, 0, 2)))
    assert [pair[3] for pair in pairs] == [{"pref_overall": 1}, {"pref_overall": -1}]
    assert pairs[0][:3] == ("Up.", "sorted(x)", "x.sort()")
    assert "left out: pairs without a preference: 1\n" in capsys.readouterr().out


def test_helpsteer2_preference(tmp_path):
    record = {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 1}
    assert convert(tmp_path, [record])[0][3] == {"pref_overall": -1}


def test_ultrafeedback_makes_all_pairs_and_takes_na_as_missing(tmp_path):
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    ratings = {"A": ("5", "N/A", "1", "3"), "B": ("5", "4", "2", "3"), "C": ("1", "5", "5", "5")}
    completions = [
        {
            "model": "gpt-4",
            "response": response,
            "annotations": {
                name: {"Rating": x, "Rationale": "..."}
                for name, x in zip(names, given, strict=True)
            },
            "overall_score": 7.0,
        }
        for response, given in ratings.items()
    ]
    record = {"source": "flan", "instruction": "Do it.", "completions": completions}
    pairs = convert(tmp_path, [record, record | {"completions": []}])
    assert [pair[:3] for pair in pairs] == [("Do it.", *x) for x in ("AB", "AC", "BC")]
    assert [[pair[3][f"pref_{name}"] for name in names] for pair in pairs] == [
        [0, None, -1, 0],
        [1, None, -1, -1],
        [1, -1, -1, -1],
    ]


def binarized(first, second):
    texts = {"prompt": "q", "chosen": say("q", "a"), "rejected": say("q", "b")}
    return texts | {"messages": say("q", "a"), "score_chosen": first, "score_rejected": second}


def test_ultrafeedback_binarized_takes_equal_scores_as_a_tie(tmp_path, capsys):
    pairs = convert(tmp_path, [binarized(8.5, 7.0), binarized(8.0, 8.0)])
    assert pairs == [("q", "a", "b", {"pref_overall": 1})]
    assert "pairs without a preference: 1\n" in capsys.readouterr().out


def test_beavertails_pairs_safe_with_unsafe_answers_and_averages_marks(tmp_path, capsys):
    violence = "violence,aiding_and_abetting,incitement"
    answers = [("bad", False, True), ("good", True, False), ("bad", True, False)]
    answers += [("bad", False, True), ("worse", False, True)]
    marks = [
        {
            "prompt": "p",
            "response": response,
            "category": {"self_harm": False, violence: violent},
            "is_safe": safe,
        }
        for response, safe, violent in answers
    ]
    labels = {"pref_harmless": -1, "pref_self_harm": 0, "pref_violence": -1}
    pairs = convert(tmp_path, marks)
    assert pairs[0] == ("p", "bad", "good", labels)
    assert pairs[2] == ("p", "good", "worse", {name: -x for name, x in labels.items()})
    soft = convert(tmp_path, marks, "--strength", "soft")
    assert soft[0][3]["pref_harmless"] == pytest.approx(1 / 3 - 1)
    assert "equally safe" not in capsys.readouterr().out  # a third is safer than none


def transcript(*turns):
    names = ("\n\nHuman: ", "\n\nAssistant: ")
    return "".join(names[i % 2] + turn for i, turn in enumerate(turns))


def test_hh_rlhf_takes_the_objective_from_the_folder(tmp_path, capsys):
    shared = ("Hi", "Hello", "And?")
    pair = {"chosen": transcript(*shared, "Yes."), "rejected": transcript(*shared, "No.")}
    parted = {"chosen": transcript("Hi", "Yes."), "rejected": transcript("Ho", "No.")}
    late = {"chosen": transcript("Hi", "A", "B", "C"), "rejected": transcript("Hi", "A", "D", "E")}
    same = {"chosen": transcript("Hi", "A"), "rejected": transcript("Hi", "A")}
    records = [pair, parted, late, same]
    [found] = convert(tmp_path, records, name="hh/harmless-base/train.jsonl.gz")
    assert found == ("And?", "Yes.", "No.", {"pref_harmless": 1})
    row = json.loads((tmp_path / "out" / "pairs.jsonl").read_text())
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user"]
    printed = capsys.readouterr().out
    assert "pairs without a common prompt: 1\n" in printed
    assert "pairs that differ before the answer: 1\n" in printed
    assert "pairs of equal answers: 1\n" in printed
    # Both folders: one objective each.
    written(tmp_path / "hh" / "helpful-base" / "train.jsonl.gz", [pair])
    output = tmp_path / "both.jsonl"
    assert main(["data", str(tmp_path / "hh"), "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{*row} - {"prompt", "chosen", "rejected"} for row in rows] == [
        {"pref_harmless"},
        {"pref_helpful"},
    ]
    assert "the data do not name their objective" in refusal(
        capsys, written(tmp_path / "train.jsonl", [pair]), "--output", tmp_path / "new.jsonl"
    )
    [found] = convert(tmp_path, [pair], "--objective", "polite", name="train.jsonl")
    assert found[3] == {"pref_polite": 1}


def test_the_papers_layouts(tmp_path):
    pair = {"chosen": say("q", "a b"), "rejected": say("q", "a")}
    signs = {"raco_s_quality": 1.0, "raco_s_verbosity": -1.0, "raco_s_faithfulness": 0.0}
    expected = {"pref_quality": 1, "pref_verbosity": -1, "pref_faithfulness": 0}
    assert convert(tmp_path, [{**pair, **signs}]) == [("q", "a b", "a", expected)]
    raw = {"Summary_A": say("q", "a b"), "Summary_B": say("q", "a")}
    labels = [("A", "Summary_B"), ("tie", 1), (-1.0, None)]
    pairs = convert(tmp_path, [{**raw, "Quality": q, "Verbosity": v} for q, v in labels])
    assert [tuple(pair[3].values()) for pair in pairs] == [(1, -1), (0, 1), (-1, None)]


def test_own_pairs_keep_soft_labels_and_weights(tmp_path):
    own = {"prompt": "q", "chosen": [say("q", "a")[1]], "rejected": "b"}  # text beside messages
    labels = {"pref_a": 0.25, "weight_a": 2.0, "pref_b": None}
    assert convert(tmp_path, [{**own, **labels}]) == [("q", "a", "b", labels)]


def test_any_pairs_with_one_named_objective(tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "source": "web"}
    found = convert(tmp_path, [pair], "--layout", "chosen-rejected", "--objective", "style")
    assert found == [("q", "a", "b", {"pref_style": 1})]


PAGE = (Path(__file__).parent.parent / "docs" / "preference-data.md").read_text()
BLOCKS = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_every_layout_is_in_the_table_of_the_docs():
    assert all(f"`{name}`" in PAGE for name in LAYOUTS)


def test_the_docs_show_what_is_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    safe = {**PKU, "is_response_0_safe": True}
    other = {**safe, "better_response_id": 1, "safer_response_id": 0}
    same = {**PKU, "response_1": PKU["response_0"]}
    written(Path("PKU-SafeRLHF/train.jsonl"), [PKU, safe, other, same])
    assert main(["data", "PKU-SafeRLHF/train.jsonl", "--output", "pairs.jsonl"]) == 0
    printed = capsys.readouterr()
    assert printed.err + printed.out == BLOCKS[0]
    first = json.loads(Path("pairs.jsonl").read_text().splitlines()[0])
    assert first == json.loads(BLOCKS[1])


def test_the_rules_in_the_docs_are_valid():
    found = [rules_of(yaml.safe_load(block)) for block in BLOCKS if block.startswith("prompt:")]
    assert [len(x.scores) for x in found] == [2, 2, 2]


# Strengths and forms


def test_strength_is_kept_in_the_label_or_as_a_weight(tmp_path):
    records = [helpsteer3(-3), helpsteer3(1)]
    soft = convert(tmp_path, records, "--strength", "soft")
    assert [pair[3] for pair in soft] == [
        {"pref_overall": 1.0},
        {"pref_overall": pytest.approx(-1 / 3)},
    ]
    weighted = convert(tmp_path, records, "--strength", "weight")
    assert [pair[3] for pair in weighted] == [
        {"pref_overall": 1, "weight_overall": 1.0},
        {"pref_overall": -1, "weight_overall": pytest.approx(1 / 3)},
    ]


def test_text_form_is_the_transcript_of_hh_rlhf(tmp_path):
    chosen, rejected = (transcript("Hi", "Hello", "And?", x) for x in ("Yes.", "No."))
    source = written(tmp_path / "helpful.jsonl", [{"chosen": chosen, "rejected": rejected}])
    output = tmp_path / "pairs.jsonl.gz"
    assert main(["data", str(source), "--output", str(output), "--format", "text"]) == 0
    [row] = [json.loads(line) for line in gzip.decompress(output.read_bytes()).splitlines()]
    assert row["prompt"] + row["chosen"] == chosen
    assert row["prompt"] + row["rejected"] == rejected
    assert row["prompt"].endswith("And?\n\nAssistant:")


def test_a_prompt_may_be_a_transcript_or_empty():
    assert as_messages(transcript("Hi") + "\n\nAssistant:") == say("Hi", "")[:1]
    assert as_messages("") == [{"role": "user", "content": ""}]
    assert as_text(as_messages(transcript("Hi", "Ho"))) == transcript("Hi", "Ho")


@pytest.mark.parametrize("text", ["[1, 2]", '{"a": 1}', "[{'a': 1}]", "None", "- role: user"])
def test_text_that_is_no_message_stays_text(text):
    assert decoded(text) == text


# The user's rules


def rules(tmp_path, content, name="rules.json"):
    path = tmp_path / name
    path.write_text(json.dumps(content) if name.endswith("json") else content)
    return "--layout", str(path)


def test_rules_in_yaml(tmp_path):
    text = """
        prompt: question
        responses: [a, b]
        scores:
          helpful: [help_a, help_b]
          brief: {fields: [words_a, words_b], better: lower, margin: 10}
        preferences:
          harmless: {field: safer, first: A, second: [B, b], tie: both}
          polite: polite
        weights: {harmless: agreement}
    """
    record = {"question": "q", "a": "x", "b": "y", "help_a": 0.3, "help_b": "0.1", "words_a": 12}
    said = {"words_b": 21, "safer": "b", "polite": -0.5, "agreement": 0.8}
    also = {"words_b": 22, "safer": "both", "polite": None, "agreement": None, "help_b": "N/A"}
    options = rules(tmp_path, text, "rules.yaml")
    first, second = convert(tmp_path, [{**record, **said}, {**record, **also}], *options)
    assert first[:3] == ("q", "x", "y")
    assert first[3] == {
        "pref_harmless": -1,
        "weight_harmless": 0.8,
        "pref_polite": -0.5,
        "pref_helpful": 1,
        "pref_brief": 0,
    }
    assert list(second[3].values()) == [0, None, None, 1]


def test_rules_for_one_answer_a_record_and_for_lists(tmp_path):
    records = [
        {"q": q, "a": a, "n": n} for q, a, n in (("p", "x", 1), ("q", "z", 5), ("p", "y", 3))
    ]
    content = {"prompt": "q", "responses": "a", "scores": {"long": "n"}}
    assert convert(tmp_path, records, *rules(tmp_path, content)) == [
        ("p", "x", "y", {"pref_long": -1})
    ]
    content = {"prompt": "q", "responses": "a[].text", "scores": {"long": "n[]"}}
    records = [{"q": "p", "a": [{"text": x} for x in "xyz"], "n": [1, 3, 3]}]
    pairs = convert(tmp_path, records, *rules(tmp_path, content))
    assert [pair[3]["pref_long"] for pair in pairs] == [-1, -1]  # y and z are a tie


TWO = {"responses": ["a", "b"]}
FIELDS = {"fields": ["m", "n"]}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ([], ["the file must have names and values"]),
        (TWO | {"score": {}}, ["'score'", "must have only prompt, responses"]),
        (TWO, ["must name at least one objective"]),
        ({"responses": "a", "scores": {"x": "n"}}, ["`prompt` must be given"]),
        (TWO | {"scores": {"x": "n"}}, ["one field per response, 2"]),
        (TWO | {"scores": {"x": FIELDS | {"better": "more"}}}, ["higher or lower", "'more'"]),
        (
            TWO | {"scores": {"x": FIELDS | {"margin": -1}}},
            ["`margin` must be a number above 0", "-1"],
        ),
        (
            {"responses": ["a", "b", "c"], "preferences": {"x": "n"}},
            ["need 2 responses", "got 3"],
        ),
        (TWO | {"preferences": {"x": {"field": "n", "first": 1}}}, ["`first` and `second`"]),
        (
            {"prompt": "q", "responses": "a", "scores": {"x": "n"}, "weights": {"x": "w"}},
            ["`weights` need records"],
        ),
        (
            TWO | {"preferences": {"x": "n"}, "weights": {"y": "w"}},
            ["objectives (x)", "'y'"],
        ),
        (TWO | {"preferences": {"a,b": "n"}}, ["without = and ,"]),
    ],
)
def test_bad_rules(tmp_path, capsys, content, parts):
    source = written(tmp_path / "data.jsonl", [{"a": "x"}])
    message = refusal(capsys, source, "--output", tmp_path / "o.jsonl", *rules(tmp_path, content))
    assert all(part in message for part in ("rules.json", *parts)), message


def test_yaml_without_its_package_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    source = written(tmp_path / "data.jsonl", [PKU])
    options = rules(tmp_path, "prompt: q", "rules.yaml")
    message = refusal(capsys, source, "--output", tmp_path / "o.jsonl", *options)
    assert "pip install pyyaml" in message
    assert ".json" in message


# What is refused


SAFE = {"safer_response_id": "N/A", "is_response_0_safe": 1}


@pytest.mark.parametrize(
    ("record", "options", "parts"),
    [
        ({"text": "a"}, [], ["line 1", "no known layout", "it has text", "--layout"]),
        (PKU, ["--layout", "helpsteer2"], ["needs response, helpfulness", "helpsteer2"]),
        (PKU, ["--layout", "pku"], ["`--layout` must be one of pku-saferlhf", "got pku"]),
        (PKU, ["--objective", "kind"], ["pku-saferlhf names its objectives"]),
        ({**PKU, "better_response_id": 2}, [], ["`better_response_id`", "2"]),
        ({**PKU, "better_response_id": "yes"}, [], ["`better_response_id`", "'yes'"]),
        ({**PKU, "prompt": None}, [], ["at least one pair", "without a common prompt: 1"]),
        ({**PKU, "response_0": ["a"]}, [], ["`role` and `content`", "'a'"]),
        ({**PKU, "response_0": "[{'role': 'user'}]"}, [], ["looks like messages", "json.dumps"]),
        ({**PKU, "response_0": "\ud800"}, [], ["must be valid Unicode"]),
        (
            PKU | dict.fromkeys(["better_response_id", "safer_response_id"]) | SAFE,
            [],
            ["at least one pair", "pairs without a preference: 1"],
        ),
        (helpsteer3(-4), [], ["`overall_preference`", "-4"]),
        ({**helpsteer3(1), "context": []}, [], ["a list of messages must not be empty"]),
        ({"instruction": "i", "completions": "text"}, [], ["must be JSON", "'text'"]),
        ({**binarized(99, 1)}, [], ["99", "`largest`, 10"]),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "pref_x": 3}, [], ["`pref_x`", "3"]),
        ({"chosen": "a", "rejected": "b", "pref_x": 1, "margin_x": 3}, [], ["would be lost"]),
        ([1], [], ["a record must have names and values", "[1]"]),
    ],
)
def test_bad_records(tmp_path, capsys, record, options, parts):
    source = written(tmp_path / "data.jsonl", [record])
    output = tmp_path / "pairs.jsonl"
    message = refusal(capsys, source, "--output", output, *options)
    assert all(part in message for part in parts), message
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl"}


def test_the_record_that_is_wrong_is_named_and_nothing_is_written(tmp_path, capsys):
    source = written(tmp_path / "data.jsonl", [PKU, PKU, {**PKU, "safer_response_id": 7}])
    message = refusal(capsys, source, "--output", tmp_path / "pairs.jsonl")
    assert f"{source}, line 3: `safer_response_id` must be one of 0, 1; got 7" in message
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl"}


def test_an_output_that_is_there_is_kept(tmp_path, capsys):
    source = written(tmp_path / "data.jsonl", [PKU])
    (output := tmp_path / "pairs.jsonl").write_text("precious")
    assert "Add --overwrite" in refusal(capsys, source, "--output", output)
    assert output.read_text() == "precious"
    bad = written(tmp_path / "bad.jsonl", [{**PKU, "prompt": 3}])
    refusal(capsys, bad, "--output", output, "--overwrite")
    assert output.read_text() == "precious"
    assert main(["data", str(source), "--output", str(output), "--overwrite"]) == 0
    assert json.loads(output.read_text())["pref_helpful"] == 1
    assert ".jsonl or .jsonl.gz" in refusal(capsys, source, "--output", tmp_path / "pairs.csv")


def test_strength_needs_the_largest_difference(tmp_path, capsys):
    content = {"prompt": "q", "responses": "a", "scores": {"long": "n"}}
    source = written(tmp_path / "data.jsonl", [{"q": "p", "a": "x", "n": 1}])
    options = ("--output", tmp_path / "o.jsonl", "--strength", "soft")
    message = refusal(capsys, source, *rules(tmp_path, content), *options)
    assert "`--strength` needs `largest`" in message


# Training on converted pairs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["messages", "text"])
def test_two_sets_in_their_own_layout_train_one_model(tmp_path, monkeypatch, form):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <eos> {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "model")
    files = []
    for name, many in (("helpful", 6), ("harmless", 2)):
        pair = {"chosen": transcript("we show", "the data"), "rejected": transcript("we show", "a")}
        source = written(tmp_path / f"{name}-base" / "train.jsonl.gz", [pair] * many)
        files.append(str(tmp_path / f"{name}.jsonl"))
        assert main(["data", str(source), "--output", files[-1], "--format", form]) == 0
    run = {
        "model": [str(tmp_path / "model")],
        "data": [f"{files[0]}=0.75", f"{files[1]}=0.25"],
        "eval_data": files,
        "weights": ["helpful=0.7,harmless=0.3"],
        "output_dir": [str(tmp_path / "out")],
        "max_steps": ["1"],
        "per_device_train_batch_size": ["8"],
        "report_to": ["none"],
    }
    assert main(["align", *(x for name, given in run.items() for x in (f"--{name}", *given))]) == 0
    scores = json.loads((tmp_path / "out" / "raco_run.json").read_text())["result"]["evaluation"]
    assert {name: x["labelled"] for name, x in scores.items()} == {"helpful": 6, "harmless": 2}
