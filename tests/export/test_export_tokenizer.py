"""Tests of: dualtrain.model.exported_tokenizer: training's ids, wherever it came from."""

import base64
import json

import pytest
from transformers import AutoTokenizer

from data_tools.tokenizers.probes import probe_texts
from data_tools.tokenizers.ranks import from_rank_file
from data_tools.tokenizers.tokenizer import Tokenizer
from dualtrain.model.exported_tokenizer import write_tokenizer

NAMES = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")
TEXTS = [text for text in probe_texts() if text]


def opened(directory):
    # The remote code of the paper's head is not asked for.
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def exported(source: Tokenizer, tmp_path):
    source.save(tmp_path / "source.json")
    directory = tmp_path / "export"
    directory.mkdir()
    write_tokenizer(
        tmp_path / "source.json", directory, special_tokens=source.special_tokens, context=32
    )
    return opened(directory)


def check(tokenizer, source: Tokenizer):
    """Ids are `<s>` and the training's, and decoding gives the text back."""
    begin = source.special_tokens["<s>"]
    for text in TEXTS:
        expected = [begin, *source.encode(text)]
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == expected
        if not any(name in text for name in source.special_names):
            assert tokenizer(text)["input_ids"] == expected
        given_back = tokenizer.decode(expected, skip_special_tokens=True)
        assert given_back == source.decode(source.encode(text))
    assert tokenizer("text", add_special_tokens=False)["input_ids"] == source.encode("text")


@pytest.fixture(scope="module")
def trained(cases):
    source = Tokenizer.load(cases["paper"].run_dir / "step-00000003" / "tokenizer.json")
    source.special_names = [*NAMES, *(f"<reserved_{i}>" for i in range(5, 16))]
    return source


def test_ids_and_texts_of_an_export(case, trained):
    assert not trained.round_trip_failures()
    check(opened(case.directory), trained)


def test_what_transformers_asks_of_a_tokenizer(case):
    tokenizer = opened(case.directory)
    assert tokenizer.is_fast and tokenizer.model_max_length == 32
    roles = ("unk", "bos", "eos", "pad", "mask")
    assert [getattr(tokenizer, f"{role}_token") for role in roles] == list(NAMES)
    assert [getattr(tokenizer, f"{role}_token_id") for role in roles] == [0, 1, 2, 3, 4]
    batch = tokenizer(["a", "a longer text"], padding=True)
    assert set(batch.keys()) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0][0] == 3 and batch["attention_mask"][0][0] == 0


def test_a_mask_in_a_text_takes_the_space_before_it(case, trained):
    tokenizer = opened(case.directory)
    ids = tokenizer("The <mask> sat <mask><mask>.")["input_ids"]
    parts = [[1], trained.encode("The"), [4], trained.encode(" sat"), [4, 4], trained.encode(".")]
    assert ids == sum(parts, [])


def test_it_saves_and_loads_again(case, trained, tmp_path):
    opened(case.directory).save_pretrained(tmp_path)
    check(AutoTokenizer.from_pretrained(tmp_path), trained)


def test_from_ranks_of_tiktoken(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"th", b"the", b" the", b"in", b"ing", b" a", b"  ", b"\n\n", b"er", b" w"]
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens)]
    (tmp_path / "small.tiktoken").write_text("\n".join(lines))
    source = from_rank_file(tmp_path / "small.tiktoken", pattern="cl100k_base")
    assert source.special_tokens["<s>"] > 256
    source.special_names = NAMES
    tokenizer = exported(source, tmp_path)
    assert tokenizer.bos_token_id == source.special_tokens["<s>"]
    check(tokenizer, source)


@pytest.mark.parametrize(
    "processor",
    [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<pad>", 3]}
        | {"trim_offsets": True, "add_prefix_space": False},
        {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel", "add_prefix_space": False}
                | {"trim_offsets": False, "use_regex": True},
                {
                    "type": "TemplateProcessing",
                    "single": [
                        {"SpecialToken": {"id": "<pad>", "type_id": 0}},
                        {"Sequence": {"id": "A", "type_id": 0}},
                    ],
                    "pair": [],
                    "special_tokens": {"<pad>": {"id": "<pad>", "ids": [3], "tokens": ["<pad>"]}},
                },
            ],
        },
    ],
    ids=["byte-level", "roberta", "llama-3"],
)
def test_post_processors_and_leading_spaces_of_others(trained, tmp_path, processor):
    content = json.loads(trained.json)
    content["post_processor"] = processor
    content["pre_tokenizer"]["add_prefix_space"] = True
    source = Tokenizer(json.dumps(content), where="other")
    source.special_names = trained.special_names
    assert source.encode("text") == source.encode(" text")
    tokenizer = exported(source, tmp_path)
    check(tokenizer, source)
    # Kept: whether the space before a word belongs to its place in the text.
    trims = processor["type"] == "ByteLevel"
    offsets = tokenizer("a text", return_offsets_mapping=True)["offset_mapping"]
    assert (offsets[2][0] == 2) == trims
