"""Model files: where they are, what they are, and a name for their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lvlmrec.errors import ConfigError, one_line
from lvlmrec.features.recipe_config import LVLMInfo
from lvlmrec.features.sources import Reading
from lvlmrec.lvlms.files import hub, torchvision_shim, weight_files
from lvlmrec.lvlms.protocol import ModelConfig, is_hub_id

QUOTED = 300  # characters of what a library raises
WHOLE_FILE_BYTES = 64 * 2**20
NUM_BLOCKS = 64
BLOCK_BYTES = 64 * 2**10
MAX_HEADER_BYTES = 100 * 10**6  # safetensors' own limit
NEEDS_CODE = (
    "transformers does not hold this model, and the code in its repository is not run unless "
    "lvlm.trust_remote_code=true says so, with lvlm.name=auto and the commit of a hub id in lvlm.revision"
)
# a text configuration's keys; where one is not 0, layers share weights whose shape depends on how many layers there are
DEPTH_KEYS = ("num_kv_shared_layers", "hidden_size_per_layer_input")
ModelConfigT = TypeVar("ModelConfigT", bound=ModelConfig)
# of transformers' GenerationConfig: what acts without sampling, and the value with which it does not
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "guidance_scale": 1.0,
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("exponential_decay_length_penalty", "max_time", "sequence_bias", "stop_strings")),
    "watermarking_config": None,
}
_UNREAD = re.compile(r"(README|LICENSE|NOTICE|USE_POLICY).*|.*\.md", re.IGNORECASE)


def read_model_config(config: ModelConfig, family: str, model_types: Collection[str] = ()) -> Any:
    """`read_any_config` of a model whose `model_type` is the family's name or, where given, one of `model_types`.

    Raises `ConfigError`, also when the files hold a model of another type.
    """
    model_types = model_types or (family,)
    read_config(config, model_types, family)
    return read_any_config(config, f"a {' or '.join(model_types)} model")


def read_any_config(config: ModelConfig, expected: str) -> Any:
    """The Hugging Face configuration of `config.model`; code of the model's own runs only with `trust_remote_code`.

    Raises `ConfigError` when the directory or hub id cannot be read; the message says what is `expected` there.
    """
    check(config, expected)
    try:
        return _auto_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code=True" in str(error):
            raise ConfigError(f"lvlm.model: {config.model!r}: {NEEDS_CODE}") from error
        raise ConfigError(
            f"lvlm.model: {config.model!r}: {_expectation(expected)}; {one_line(error, QUOTED)}"
        ) from error


def _auto_config(config: ModelConfig) -> Any:
    from transformers import AutoConfig

    where, trusts = directory(config), config.trust_remote_code
    try:
        return AutoConfig.from_pretrained(where, trust_remote_code=trusts)
    except ImportError:  # configurations of Llama decoders import torchvision, which is slow to import for all
        torchvision_shim.ensure_importable()
        return AutoConfig.from_pretrained(where, trust_remote_code=trusts)


def read_config(config: ModelConfig, model_types: Collection[str], family: str) -> dict[str, Any]:
    """The config.json of `config.model` as it is, also of a `model_type` that transformers does not hold.

    Raises `ConfigError` when the directory or hub id cannot be read or holds a model of none of `model_types`.
    """
    expected = f"a {' or '.join(model_types)} model"
    check(config, expected)
    try:
        tree = read_json(config, "config.json")
    except ConfigError as error:
        reason = one_line(error.__cause__ or error, QUOTED)
        raise ConfigError(f"lvlm.model: {config.model!r}: {_expectation(expected)}; {reason}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"lvlm.model: {config.model!r}: config.json holds no JSON object; {_expectation(expected)}")
    if tree.get("model_type") not in model_types:
        refuse(config, str(tree.get("model_type")), family, expected)
    return tree


def refuse(config: ModelConfig, model_type: str, family: str, expected: str) -> NoReturn:
    """Raises `ConfigError`: these files hold another kind of model than the family reads."""
    found = f"{config.model!r} is a {model_type} model"
    raise ConfigError(f"lvlm.model: {found}; lvlm.name={family}: {_expectation(expected)}")


def read_json(config: ModelConfig, name: str) -> Any:
    """The JSON in a file of the model, None where the model has no such file. Raises `ConfigError`."""
    path = _file(config, name)
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"lvlm.model: {config.model!r}: {name}: {one_line(error, QUOTED)}") from error


def _file(config: ModelConfig, name: str) -> Path | None:
    """A file of the model, None where it has no such file. Raises `ConfigError`."""
    path = directory(config) / name
    return path if path.is_file() else None


def bos_written(config: ModelConfig) -> bool:
    """Whether the chat template begins with the beginning-of-text token, and the tokenizer would add special tokens.

    The tokenizer is loaded only where the template could write the token. Raises `ConfigError`.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    template = _chat_template(config)
    named = (read_json(config, "tokenizer_config.json") or {}).get("bos_token") or ""
    bos = named.get("content", "") if isinstance(named, dict) else named
    if "bos_token" not in template and (not bos or bos not in template):
        return False
    try:
        words: Any = AutoTokenizer.from_pretrained(directory(config), trust_remote_code=config.trust_remote_code)
        message = {"role": "user", "content": [{"type": "text", "text": "x"}]}
        text = words.apply_chat_template([message], chat_template=template, tokenize=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, TemplateError):
        return False  # loading says what is wrong
    if not words.bos_token or not text.startswith(words.bos_token):
        return False
    return bool(words(text)["input_ids"] != words(text, add_special_tokens=False)["input_ids"])


def generation(config: ModelConfig) -> dict[str, Any]:
    """What generation_config.json says that would change the likeliest answer. Raises `ConfigError`.

    Not which tokens begin, end and pad, and nothing of how transformers would sample.
    """
    tree = read_json(config, "generation_config.json") or {}
    return {key: tree[key] for key, neutral in _NEUTRAL.items() if tree.get(key) not in (None, neutral, [])}


def _chat_template(config: ModelConfig) -> str:
    """The chat template of a processor's files; empty where there is none. Raises `ConfigError`."""
    path = _file(config, "chat_template.jinja")
    if path is None:
        return str((read_json(config, "chat_template.json") or {}).get("chat_template", ""))
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"lvlm.model: {config.model!r}: {path.name}: {one_line(error, QUOTED)}") from error


def pin(config: ModelConfigT) -> ModelConfigT:
    """`config` with the commit of a hub id, so that every process that gets it reads the same files.

    The one place where a branch is asked for. Raises `ConfigError`.
    """
    if not is_hub_id(config.model):
        return config
    return replace(config, revision=_commit(config, "a model"))


def directory(config: ModelConfig, weights: bool = False, expected: str = "a model") -> Path:
    """The folder with the model's files; those of a hub id are downloaded, its weights only where they are asked for.

    Raises `ConfigError`; the message says what is `expected` there.
    """
    if Path(config.model).is_dir():
        return Path(config.model)
    commit = _commit(config, expected)
    try:
        return hub.all_files(config.model, commit) if weights else hub.small_files(config.model, commit)
    except (OSError, ValueError) as error:
        raise ConfigError(f"lvlm.model: {config.model!r}: {_expectation(expected)}; {error}") from error


def _commit(config: ModelConfig, expected: str) -> str:
    try:
        return hub.commit_of(config.model, config.revision)
    except OSError as error:
        raise ConfigError(f"lvlm.model: {config.model!r}: {_expectation(expected)}; {error}") from error


def identity(config: ModelConfig) -> str:
    """`content:<hash>` of a local directory, `owner/name@<commit>` of a hub id; never a path. Raises `ConfigError`."""
    if Path(config.model).is_dir():
        return f"content:{hash_directory(Path(config.model))}"
    return f"{config.model}@{_commit(config, 'a model')}"


def check_identity(config: ModelConfig, recipe: Reading, info: LVLMInfo) -> None:
    """Raises `ConfigError` when the files are not the recipe's."""
    if info.identity != recipe.identity:
        raise ConfigError(f"lvlm.model: {config.model!r} is {info.identity}, the recipe names {recipe.identity}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and warnings: it reports layers left out on purpose as unexpected weights."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def hash_directory(directory: Path) -> str:
    """32 hex digits over names and contents of the files that can change a feature; dates do not count.

    Files above 64 MiB are sampled: size, safetensors header and 64 evenly spaced blocks of 64 KiB.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory)
        if any(part.startswith(".") for part in name.parts) or _UNREAD.fullmatch(path.name):
            continue
        digest.update(f"{name.as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(_hash_file(path))
    return digest.hexdigest()


def check(config: ModelConfig, expected: str = "a model") -> None:
    """Raises `ConfigError` unless there is a configuration, and no weights beside it that cannot be read."""
    if not config.model:  # the path of which is the directory that the job was started in
        raise ConfigError(f"lvlm.model is empty; {_expectation(expected)}")
    where = Path(config.model)
    if not where.is_dir() and not is_hub_id(config.model):
        raise ConfigError(f"lvlm.model: {config.model!r}: no such directory; {_expectation(expected)}")
    folder = directory(config, expected=expected)
    try:
        listed = None if where.is_dir() else hub.listing(config.model, folder.name)  # snapshots/<commit>/
        fault = weight_files.fault(folder, weight_files.sizes_of(folder) if listed is None else listed)
    except (OSError, ValueError) as error:
        fault = one_line(error, QUOTED)
    if fault:
        raise ConfigError(f"lvlm.model: {config.model!r}: {fault}")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"lvlm.model: {config.model!r}: there is no config.json; {_expectation(expected)}")


def _expectation(expected: str) -> str:
    return f"expected a local directory or a hub id (owner/name) of {expected}"


def _hash_file(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(length, MAX_HEADER_BYTES)))
        for block in range(NUM_BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.digest()
