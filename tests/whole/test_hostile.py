"""Hostile models: none runs code, writes elsewhere, fills the memory or paints the terminal.

HOSTILE_TABLE=FILE writes down what the user sees of each.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from factory.artifacts import Build
from factory.builds.integrity import take_sums
from factory.checkpoint.auxiliary import check_json, check_sizes
from factory.checkpoint.header import MAX_TENSORS
from tests.builders.commands import HEAVY, QUICK
from tests.builders.models import byte_tokenizer, save_llama
from tests.builders.texts import rhymes
from tests.forks import Ended, Forks
from tests.loopback_hub import Hub

CANARY = "canary"  # what foreign code would leave in the working directory
CODE = f"open({CANARY!r}, 'w').close()\n"
ESCAPE = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\r\b\u202e"
# 3 GB beyond what the libraries have mapped, and a minute of the processor.
LIMITED = """
import resource
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * 10**9,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
"""


@dataclass(frozen=True)
class Case:
    """A hostile model, and what the user is told; nothing where it is built as if it were harmless."""

    name: str
    make: Callable[[Path], object]
    says: tuple[str, ...] = ()
    model: str = "model"  # as typed


def changed(file: str, **fields: Any) -> Callable[[Path], object]:
    """The model with other values in a JSON file."""

    def change(folder: Path) -> None:
        value = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(value | fields))

    return change


def wrote(file: str, content: str | bytes) -> Callable[[Path], object]:
    """The model with another file."""
    raw = content.encode() if isinstance(content, str) else content

    def write(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        (folder / file).write_bytes(raw)

    return write


def every(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder) for change in changes]


def sparse(file: str, size_bytes: int) -> Callable[[Path], object]:
    """A file that seems so long and takes no room."""
    return lambda folder: os.truncate(folder / file, size_bytes)


def many_lists(file: str, count: int = 10**6) -> Callable[[Path], object]:
    """The model with so many empty lists in a JSON file: each takes 3 bytes here, and 64 once parsed."""

    def change(folder: Path) -> None:
        text = (folder / file).read_text().rstrip() if (folder / file).exists() else "{}"
        lists = ",".join(["[]"] * count)
        more = "" if text == "{}" else ","
        (folder / file).write_text(f'{text[:-1]}{more}"x":[{lists}]}}')

    return change


def index_of(shard: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "x.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(RunsWhenRead.pickled())


class RunsWhenRead:
    """A pickle that leaves the canary."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (CANARY, "w")

    @classmethod
    def pickled(cls) -> bytes:
        return pickle.dumps(cls())


def renamed_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {ESCAPE: torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})


def many_experts(folder: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=1, vocab_size=257, num_local_experts=2)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    changed("config.json", num_local_experts=10**9)(folder)


def long_header(folder: Path) -> None:
    """Well-formed, of tensors without a value: what the library itself would read."""
    entries = (f'"{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for number in range(580_000))
    text = f"{{{','.join(entries)}}}".encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def linked(file: str) -> Callable[[Path], object]:
    """A file of the model as a link to one of the user's own."""

    def link(folder: Path) -> None:
        (folder / file).touch()
        (folder / file).rename(folder.parent / "secret.txt")
        (folder / file).symlink_to(folder.parent / "secret.txt")

    return link


def tokenizing(**parts: Any) -> Callable[[Path], object]:
    """The model with other parts of its tokenizer."""
    return changed("tokenizer.json", **parts)


def replaced(before: str, after: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": before}, "content": after}


END = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
MANY_ENDS = {
    "type": "TemplateProcessing",
    "single": [TEXT, *[END] * 100_000],
    "pair": [TEXT, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
}
LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))
BOMB = f"---\na0: &a0 [{'lol ' * 10}]\n{LAUGHS}\nlanguage: *a11\nlicense_name: *a11\nlicense: *a11\n---\n"
FOREIGN = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": "evil.Tok"}
TEMPLATE = (
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == '_wrap_close' %}"
    "{{ c.__init__.__globals__['system']('touch canary') }}{% endif %}{% endfor %}"
)
DEEP = 200_000 * '{"a":'
CASES = (
    Case("code of its own, for an unknown type",
         every(changed("config.json", model_type="evil", auto_map=FOREIGN), wrote("evil.py", CODE)),
         ("model type 'evil' needs its own code", "--trust-remote-code")),
    Case("code of its own beside a known type",
         every(changed("config.json", auto_map=FOREIGN), changed("tokenizer_config.json", auto_map=FOREIGN),
               wrote("evil.py", CODE), wrote("custom_generate/generate.py", CODE))),
    Case("weights as a pickle alone", only_pickle, ("only pickled weights", "can run code")),
    Case("a pickle beside the weights", wrote("pytorch_model.bin", RunsWhenRead.pickled())),
    Case("an index that names a pickle", every(wrote("x.bin", RunsWhenRead.pickled()), index_of("x.bin")),
         ("'x.bin', not a safetensors file beside it",)),
    Case("an index that leads out", index_of("../x.safetensors"), ("'../x.safetensors', not a safetensors",)),
    Case("an index with a path from the root", index_of("/etc/x.safetensors"), ("'/etc/x.safetensors', n",)),
    Case("an index that paints", index_of(f"{ESCAPE}.safetensors"), ("not a safetensors file beside it",)),
    Case("a tokenizer that is a link to a file elsewhere", linked("tokenizer.json"), ("is a link to",)),
    Case("a licence that is a link to a file elsewhere", linked("LICENSE"), ("LICENSE is a link to",)),
    Case("a header of 30 MB", long_header, ("its header has 3", "the limit is 16777216")),
    Case("a configuration nested 200,000 deep", wrote("config.json", DEEP), ("config.json is damaged",)),
    Case("an index nested 200,000 deep",
         every(index_of("x.safetensors"), wrote("model.safetensors.index.json", DEEP)), ("is damaged",)),
    Case("tokenizer settings nested 200,000 deep", wrote("tokenizer_config.json", DEEP), ("cannot load",)),
    Case("a number of 10,000 digits",
         wrote("config.json", f'{{"model_type": "llama", "vocab_size": {"9" * 10_000}}}'), ("is damaged",)),
    Case("a configuration of a million lists", many_lists("config.json"), ("config.json has 2,",)),
    Case("an index of a million lists",
         every(index_of("x.safetensors"), many_lists("model.safetensors.index.json")),
         ("model.safetensors.index.json has 2,",)),
    Case("generation settings of a million lists", many_lists("generation_config.json"),
         ("generation_config.json has 2,", "brackets, colons and commas")),
    Case("special tokens of a million lists", many_lists("special_tokens_map.json"),
         ("special_tokens_map.json has 2,", "brackets, colons and commas")),
    Case("a tokenizer of 4.5 million lists", many_lists("tokenizer.json", 4_500_000),
         ("tokenizer.json has 9,", "brackets, colons and commas")),
    Case("generation settings of 17 MB",
         every(wrote("generation_config.json", "{}"), sparse("generation_config.json", 2**24 + 1)),
         ("generation_config.json has 16,777,217 bytes",)),
    Case("a configuration of 1 GB", sparse("config.json", 10**9), ("config.json has 1,000,000,000 bytes",)),
    Case("a tokenizer that is cut short", wrote("tokenizer.json", '{"version": "1.0", "model": {'),
         ("cannot load the tokenizer",)),
    Case("a tokenizer with a part that is none", changed("tokenizer.json", x=[]),
         ("cannot load the tokenizer",)),
    Case("a tokenizer of 1 TB", sparse("tokenizer.json", 10**12), ("tokenizer.json has 1,000,000,000,000",)),
    Case("a tokenizer that doubles a letter 40 times",
         tokenizing(normalizer={"type": "Sequence", "normalizers": [replaced("e", "ee")] * 40}),
         ("turns one character into 1,099,511,627,776 in its normalizer",)),
    Case("a tokenizer that makes a letter 2 MB", tokenizing(normalizer=replaced("e", "x" * 2_000_000)),
         ("turns one character into 2,000,000 in its normalizer",)),
    Case("a tokenizer that writes 2 MB for a letter", tokenizing(decoder=replaced("e", "x" * 2_000_000)),
         ("turns one character into 2,000,000 in its decoder",)),
    Case("100,000 tokens around each text", tokenizing(post_processor=MANY_ENDS),
         ("puts 100,000 tokens around each text",)),
    Case("a tokenizer that pads to 10¹⁰ tokens",
         tokenizing(padding={"strategy": {"Fixed": 10**10}, "direction": "Right", "pad_to_multiple_of": None,
                             "pad_id": 0, "pad_type_id": 0, "pad_token": "x"})),
    Case("a kernel from the Hub for attention", changed("config.json", attn_implementation="evil/kernel"),
         ("asks for a kernel from the Hub",)),
    Case("attention that is not there", changed("config.json", attn_implementation="nowhere"),
         ("transformers cannot load",)),
    Case("generation settings that are a list", wrote("generation_config.json", "[]"),
         ("transformers cannot load",)),
    Case("a device map", changed("config.json", device_map="x"), ("config.json has device_map 'x'",)),
    Case("a text configuration that is null", changed("config.json", text_config=None)),
    Case("a card of 1 GB", every(wrote("README.md", "x"), sparse("README.md", 10**9)),
         ("README.md has 1,000,000,000 bytes",)),
    Case("a card whose metadata is a bomb of 10¹¹ words", wrote("README.md", BOMB)),
    Case("10⁹ layers", changed("config.json", num_hidden_layers=10**9), ("one stack of 1000000000",)),
    Case("a vocabulary of 10⁹", changed("config.json", vocab_size=10**9), ("describes 64,000,148,032",)),
    Case("a width of 10⁹", changed("config.json", hidden_size=10**9), ("config.json says hidden_size 1",)),
    Case("inner layers of 10⁸", changed("config.json", intermediate_size=10**8), ("describes 76,800,",)),
    Case("10⁹ heads", changed("config.json", num_attention_heads=10**9), ("is not a multiple",)),
    Case("10⁹ experts", many_experts, ("describes 12,",)),
    Case("10¹⁵ positions", changed("config.json", max_position_embeddings=10**15)),
    Case("tokens numbered 10⁹ and up",
         changed("tokenizer_config.json", added_tokens_decoder={str(10**9): {"content": "x"}})),
    Case("a chat template that leaves its sandbox", wrote("chat_template.jinja", TEMPLATE)),
    Case("a card with a script",
         wrote("README.md", "---\nlicense: other\nlicense_name: <script>alert(1)</script>\n---\n<script>")),
    Case("a model type that paints", changed("config.json", model_type=ESCAPE), ("unknown to transformers",)),
    Case("an architecture that paints", changed("config.json", architectures=[ESCAPE], model_type="bert"),
         ("this is an encoder",)),
    Case("a tensor's name that paints", renamed_tensor),
    Case("a licence that paints", wrote("README.md", f"---\nlicense: {json.dumps(ESCAPE)}\n---\n")),
    Case("a name with a Cyrillic letter", lambda _: None, ("not a known model",), "mistr\u0430lai/Mistral"),
    Case("a name that turns the writing round", lambda _: None, ("not a known model",), "a/\u202egnp.x"),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hostile")
    for name in ("measured", "healed", "evaluated"):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in rhymes(8)]
        (made / f"{name}.jsonl").write_text("\n".join(lines))
    return made


@pytest.fixture(scope="module")
def commands(served_hub: Hub, folder: Path) -> Iterator[Forks]:
    variables = served_hub.environment(folder / "hf") | {"HF_HUB_DISABLE_XET": "1"}
    process = Forks(variables, modules=HEAVY)
    yield process
    process.close()


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.suffix != ".lock"}


def run(commands: Forks, place: Path, *words: str) -> Ended:
    return commands.run(*words, folder=place, before=LIMITED)


def record(case: str, ended: Ended) -> None:
    """A row of the table of what users see."""
    if table := os.environ.get("HOSTILE_TABLE"):
        seen = "<br>".join(ended.stderr.splitlines()) or "nothing: it is built, and the trap stays shut"
        with Path(table).open("a", encoding="utf-8") as file:
            file.write(f"| {case} | {seen} | {ended.code} |\n")


def check_harmless(ended: Ended, place: Path) -> None:
    """No code ran, nothing paints, and what is told is one line and a hint."""
    assert not list(place.rglob(CANARY))
    for letter in "\x1b\x07\b\u202e":
        assert letter not in ended.stdout + ended.stderr
    assert ended.code in (0, 1, 2), ended.stderr
    if ended.code:
        lines = [line for line in ended.stderr.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 2, ended.stderr
        assert lines[0].startswith("error: ")
        assert lines[1].startswith("hint: ")


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_hostile_model_does_no_harm(commands: Forks, folder: Path, tmp_path: Path, case: Case) -> None:
    place = tmp_path / "place"
    save_llama(place / "model", num_layers=4)
    case.make(place / "model")
    for name in ("measured", "healed", "evaluated"):
        (place / f"{name}.jsonl").symlink_to(folder / f"{name}.jsonl")
    before = everything(tmp_path)
    ended = run(commands, place, "build", case.model, *QUICK, "--home", "home")
    record(case.name, ended)
    check_harmless(ended, tmp_path)
    assert (ended.code != 0) == bool(case.says), ended.stderr
    for words in case.says:
        assert words in ended.stderr
    new = {path.relative_to(place).parts[0] for path in everything(tmp_path) - before}
    assert new <= {"home", "builds"}
    published = {path.suffix for path in place.glob("builds/*/model/**/*")}
    assert not published & {".py", ".bin"}


def test_names_that_lead_out_of_a_repository_are_not_written(
    served_hub: Hub, commands: Forks, folder: Path, tmp_path: Path
) -> None:
    served_hub.reset()
    place = tmp_path / "a" / "b"
    save_llama(place / "model", num_layers=4)
    traps = {"../../../../tokenizer.json": b"{}", "a/../../LICENSE": b"x", "../LICENSE": b"x"}
    served_hub.put_model("acme/out", place / "model", **traps)
    before = everything(tmp_path)
    ended = run(commands, place, "prune", "acme/out", "--layers", "1", "--out", "smaller", "--home", "home")
    record("file names that lead out of the repository", ended)
    check_harmless(ended, tmp_path)
    new = {path.relative_to(tmp_path).parts[:3] for path in everything(tmp_path) - before}
    assert new <= {("a", "b", "smaller"), ("a", "b", "home")}
    assert not [path for path in folder.rglob("*") if path.name == "LICENSE"]


def test_a_file_that_the_hub_says_is_huge_is_not_downloaded(
    served_hub: Hub, commands: Forks, tmp_path: Path
) -> None:
    served_hub.reset()
    save_llama(tmp_path / "model", num_layers=4)
    served_hub.put_model("acme/huge", tmp_path / "model", **{"config.json": b" " * (2**24 + 1)})
    ended = run(commands, tmp_path, "build", "acme/huge", "--drop", "0.3", "--home", "home")
    record("a configuration of 16 MB on the Hub", ended)
    check_harmless(ended, tmp_path)
    assert "config.json has 16,777,217 bytes" in ended.stderr
    assert not [request for request in served_hub.requests if "/resolve/" in request.path]


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "special_tokens_map.json"])
def test_a_file_of_a_million_lists_on_the_hub_is_not_parsed(
    served_hub: Hub, commands: Forks, tmp_path: Path, name: str
) -> None:
    served_hub.reset()
    index_of("x.safetensors")(save_llama(tmp_path / "model", num_layers=4))
    many_lists(name)(tmp_path / "model")
    served_hub.put_model("acme/lists", tmp_path / "model")
    ended = run(commands, tmp_path, "prune", "acme/lists", "--layers", "1", "--out", "x", "--home", "home")
    record(f"{name} of a million lists on the Hub", ended)
    check_harmless(ended, tmp_path)
    assert f"{name} has 2,0" in ended.stderr


def test_a_header_of_30_mb_on_the_hub_is_not_downloaded(
    served_hub: Hub, commands: Forks, tmp_path: Path
) -> None:
    served_hub.reset()
    long_header(save_llama(tmp_path / "model", num_layers=4))
    served_hub.put_model("acme/long", tmp_path / "model")
    ended = run(commands, tmp_path, "build", "acme/long", "--drop", "0.3", "--home", "home")
    record("a header of 30 MB on the Hub", ended)
    check_harmless(ended, tmp_path)
    assert "the limit is 16777216" in ended.stderr


def test_a_record_of_67_mb_on_the_hub_is_not_downloaded(
    served_hub: Hub, commands: Forks, tmp_path: Path
) -> None:
    served_hub.reset()
    save_llama(tmp_path / "model", num_layers=4)
    served_hub.put_model("acme/told", tmp_path / "model", **{"build.json": b" " * (2**26 + 1)})
    ended = run(commands, tmp_path, "build", "acme/told", "--reproduce", "--home", "home")
    record("a build's record of 67 MB on the Hub", ended)
    check_harmless(ended, tmp_path)
    assert "it has 67,108,865 bytes" in ended.stderr
    assert not [request for request in served_hub.requests if "/resolve/" in request.path]


@pytest.fixture(scope="module")
def built(commands: Forks, folder: Path) -> Path:
    save_llama(folder / "tiny", num_layers=4)
    done = commands.run("build", "tiny", *QUICK, "--home", "home", folder=folder)
    assert done.code == 0, done.stderr
    return folder / "builds" / "tiny-drop40"


def painted(value: Any) -> Any:
    """Every text in a JSON value with escape sequences behind it; names of fields and fixed words stay."""
    fixed = ("pruned", "source", "angular", "sft", "nf4", "peak", "weights and cache")
    if isinstance(value, dict):
        return {key: painted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [painted(inner) for inner in value]
    is_text = isinstance(value, str) and value not in fixed and len(value) < 40
    return value + ESCAPE if is_text else value


@pytest.mark.parametrize("words", [("show",), ("card",), ("verify",), ("push",)])
def test_a_strangers_build_cannot_paint_the_terminal(
    commands: Forks, built: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    build = tmp_path / "build"
    (build / "model").mkdir(parents=True)
    value = json.loads((built / "build.json").read_text())
    strange = painted(value) | {"files": value["files"], "config": value["config"], "stages": value["stages"]}
    strange["source"] |= {"commit": value["source"]["commit"]}
    for path in (build / "build.json", build / "model" / "build.json"):
        path.write_text(json.dumps(strange))
    (build / "profile.json").write_text((built / "profile.json").read_text())
    take_sums(Build.read(build), build)
    ended = run(commands, tmp_path, *words, str(build))
    record(f"a stranger's build, `factory {words[0]}`", ended)
    check_harmless(ended, tmp_path)


def test_a_text_file_whose_name_paints_is_told_plainly(commands: Forks, folder: Path, tmp_path: Path) -> None:
    name = f"{ESCAPE.replace('/', '')}.jsonl"
    (tmp_path / name).write_text("not JSON\n")
    save_llama(tmp_path / "model", num_layers=4)
    ended = run(commands, tmp_path, "build", "model", "--drop", "0.4", "--calibration-data", name)
    record("a text whose file name paints", ended)
    check_harmless(ended, tmp_path)
    assert ended.code == 1


def test_an_index_of_as_many_tensors_as_any_model_has_is_none_too_many(tmp_path: Path) -> None:
    names = [f"model.layers.{n // 1000}.mlp.experts.{n % 1000}.up_proj.weight" for n in range(MAX_TENSORS)]
    weight_map = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    check_sizes({"model.safetensors.index.json": len(text)})
    check_json(tmp_path, ["model.safetensors.index.json"])
