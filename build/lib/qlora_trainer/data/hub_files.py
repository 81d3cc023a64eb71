"""Which files of a data set's repository are a split: what its card says, or else what its files are called.

Pure: a list of paths, which is all that can ever be named, and the card's text go in. A card's patterns are matched
against that list; one that could mean anything else (an absolute path, `..`, an address) is refused. Defaults and their
order are those of the `datasets` library (`data_files.py`): shards in `data/`, then folders, then file names that tell
the split, then everything as `train`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from itertools import chain
from typing import Any, cast

import yaml

from qlora_trainer.outcome import UserError

CARD_NAME = "README.md"
MAX_CARD_BYTES = 4 << 20
KINDS = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv"}
"""Which files are read together, by their endings, `.gz` aside; where two are as frequent, the first."""
OTHER_KINDS = (".arrow", ".tar", ".zip", ".xml", ".h5", ".hdf5", ".lance", ".tsv", ".txt", ".zst", ".xz", ".bz2")
"""Data that is not read here."""
KNOWN_SETTINGS = ("config_name", "data_files", "data_dir", "default", "description", "version", "features")
IGNORED_NAMES = (CARD_NAME, "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SEPARATORS = "[-._ 0-9]"
SHARD = re.compile(r"data/(?P<split>[^/]+)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(?P<yaml>.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
MAX_PATTERN_CHARACTERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One configuration of a card: the patterns of each split, or none, and the folder that they are relative to."""

    name: str
    folder: str = ""
    splits: Mapping[str, Sequence[str]] | None = None
    default: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a job asks of a data set."""

    source: str
    config: str | None
    split: str
    field: str

    @property
    def split_field(self) -> str:
        """The field that names the split."""
        return "spec.dataset.evalSplit" if self.field.endswith("evalSource") else "spec.dataset.split"


def files_of_split(paths: Sequence[str], card: str, wanted: Wanted) -> list[str]:
    """The files of the split, in the order in which they are read; raises UserError in words."""
    configuration = _chosen(_configurations(card, wanted.source), wanted)
    inside = _inside(paths, configuration.folder)
    if configuration.splits is not None:
        splits = {split: _matching_all(inside, patterns) for split, patterns in configuration.splits.items()}
    else:
        splits = _default_splits(inside)
    splits = {split: found for split, files in splits.items() if (found := _of_one_kind(files, wanted.source))}
    if not splits:
        raise UserError(
            f"{wanted.source} holds no file that can be read ({', '.join(KINDS)}, also with .gz); check {wanted.field}"
        )
    if wanted.split not in splits:
        known = ", ".join(repr(split) for split in sorted(splits))
        raise UserError(
            f"{wanted.source}: has no split {wanted.split!r}, but {known}; check {wanted.field} and "
            f"{wanted.split_field}"
        )
    prefix = f"{configuration.folder}/" if configuration.folder else ""
    return [prefix + name for name in splits[wanted.split]]


# --- the card


def _chosen(configurations: Sequence[Configuration], wanted: Wanted) -> Configuration:
    named = {configuration.name: configuration for configuration in configurations}
    if not named:
        if wanted.config not in (None, "default"):
            raise UserError(f"{wanted.source}: has no configurations; remove spec.dataset.config")
        return Configuration(name="default")
    known = ", ".join(repr(name) for name in named)
    if wanted.config is not None:
        if wanted.config not in named:
            raise UserError(
                f"{wanted.source}: has no configuration {wanted.config!r}, but {known}; check spec.dataset.config"
            )
        return named[wanted.config]
    defaults = [each for each in configurations if each.default or each.name == "default" or len(named) == 1]
    if len(defaults) != 1:
        raise UserError(f"{wanted.source}: has the configurations {known}; set spec.dataset.config")
    return defaults[0]


def _configurations(card: str, source: str) -> list[Configuration]:
    """What the card's header says; none where it says nothing of it."""
    header = FRONT_MATTER.match(card)
    if header is None:
        return []
    try:
        fields: object = yaml.safe_load(header["yaml"])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: the header of its {CARD_NAME} is not valid YAML; mend it") from error
    entries = _mapping(fields).get("configs")
    if not entries:
        return []
    if not isinstance(entries, list):
        raise _bad_card(source, "configs is not a list")
    return [_configuration(entry, source) for entry in cast("list[Any]", entries)]


def _configuration(entry: Any, source: str) -> Configuration:
    fields = _mapping(entry)
    name = fields.get("config_name")
    if not isinstance(name, str):
        raise _bad_card(source, "a configuration has no config_name")
    others = [str(key) for key in fields if key not in KNOWN_SETTINGS]
    if others:
        raise _bad_card(source, f"the configuration {name!r} sets {', '.join(sorted(others))}, which is not read")
    folder = fields.get("data_dir") or ""
    return Configuration(
        name=name,
        folder="/".join(_names(folder, source)) if folder else "",
        splits=None if fields.get("data_files") is None else _split_patterns(fields["data_files"], source),
        default=fields.get("default") is True,
    )


def _split_patterns(data_files: Any, source: str) -> dict[str, list[str]]:
    """A pattern, a list of them, or a list of splits with theirs."""
    entries = cast("list[Any]", data_files if isinstance(data_files, list) else [data_files])
    if not any(isinstance(entry, dict) for entry in entries):
        return {"train": [_pattern(entry, source) for entry in entries]}
    splits: dict[str, list[str]] = {}
    for entry in entries:
        split, path = _mapping(entry).get("split"), _mapping(entry).get("path")
        if not isinstance(split, str) or split in splits or path is None:
            raise _bad_card(source, "data_files is not a pattern, a list of them, or a list of `split` and `path`")
        patterns = cast("list[Any]", path if isinstance(path, list) else [path])
        splits[split] = [_pattern(each, source) for each in patterns]
    return splits


def _mapping(entry: Any) -> Mapping[str, Any]:
    return cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}


def _pattern(pattern: Any, source: str) -> str:
    return "/".join(_names(pattern, source))


def _names(path: Any, source: str) -> list[str]:
    """The parts of a path that can only mean files of the repository."""
    if not isinstance(path, str) or not path or len(path) > MAX_PATTERN_CHARACTERS:
        raise _bad_card(source, "a path of data_files is not a short text")
    names = [name for name in path.split("/") if name not in ("", ".")]
    if path.startswith(("/", "~")) or "\\" in path or ":" in path or ".." in names or not names:
        raise _bad_card(source, f"{path[:80]!r} does not name files of the repository, from which alone is read")
    return names


def _bad_card(source: str, what: str) -> UserError:
    return UserError(f"{source}: its {CARD_NAME} cannot be followed: {what}; mend it, or give a copy of the files")


# --- the files


def _default_splits(paths: Sequence[str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for path in _visible(paths, "data/*"):
        if found := SHARD.fullmatch(path):
            shards.setdefault(found["split"], []).append(path)
    if shards:
        return shards
    for patterns in (_in_folders, _in_names):
        splits = {split: _matching_all(paths, list(patterns(words))) for split, words in KEYWORDS.items()}
        if any(splits.values()):
            return {split: found for split, found in splits.items() if found}
    return {"train": _matching_all(paths, ["**"])}


def _in_folders(keywords: Sequence[str]) -> Iterator[str]:
    for word in keywords:
        yield f"**/{word}/**"
        yield f"**/{word}{SEPARATORS}*/**"
        yield f"**/*{SEPARATORS}{word}/**"
        yield f"**/*{SEPARATORS}{word}{SEPARATORS}*/**"


def _in_names(keywords: Sequence[str]) -> Iterator[str]:
    for word in keywords:
        yield f"**/{word}{SEPARATORS}*"
        yield f"**/*{SEPARATORS}{word}{SEPARATORS}*"


def _matching_all(paths: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The paths that match any of the patterns, each once, pattern by pattern."""
    found = chain.from_iterable(_visible(paths, pattern) for pattern in patterns)
    return [path for path in dict.fromkeys(found) if path.rpartition("/")[2] not in IGNORED_NAMES or path in patterns]


def _visible(paths: Sequence[str], pattern: str) -> Iterator[str]:
    """The matching paths, without those of hidden files and `__folders__` that the pattern does not ask for."""
    wanted = pattern.split("/")
    for path in paths:
        names = path.split("/")
        hidden = _count(names, ".") != _count(wanted, ".") or _count(names[:-1], "__") != _count(wanted[:-1], "__")
        if not hidden and _matches(names, wanted):
            yield path


def _count(names: Sequence[str], start: str) -> int:
    return sum(name.startswith(start) for name in names)


def _matches(names: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a path matches a pattern, in time of their lengths' product: `**` is any folders, at the end files."""
    reached = {0}
    for number, part in enumerate(wanted):
        if part == "**":
            least = min(reached, default=len(names)) + (number == len(wanted) - 1)
            reached = set(range(least, len(names) + 1))
        else:
            reached = {at + 1 for at in reached if at < len(names) and _compiled(part).match(names[at])}
    return len(names) in reached


@lru_cache(maxsize=1024)
def _compiled(part: str) -> re.Pattern[str]:
    return re.compile(translate(part))


def _inside(paths: Sequence[str], folder: str) -> list[str]:
    """The repository's paths that lie in a folder, relative to it, in order."""
    prefix = f"{folder}/" if folder else ""
    plain = (path for path in paths if not path.startswith("/") and ".." not in path.split("/"))
    return sorted(path.removeprefix(prefix) for path in plain if path.startswith(prefix))


def _of_one_kind(paths: Sequence[str], source: str) -> list[str]:
    """The files of the most frequent kind, which are read together."""
    kinds = Counter(kind for path in paths if (kind := kind_of(path)) is not None)
    order = [*dict.fromkeys(KINDS.values()), *OTHER_KINDS]
    ranked = sorted(kinds, key=lambda kind: (-kinds[kind], order.index(kind)))
    if ranked and ranked[0] in OTHER_KINDS:
        raise UserError(
            f"{source}: its {ranked[0]} files are not read here; give a copy of them as Parquet or JSON lines"
        )
    return [path for path in paths if ranked and kind_of(path) == ranked[0]]


def kind_of(path: str) -> str | None:
    """How a file is read; its suffix where that is not here; None where it is no data."""
    name = path.lower().removesuffix(".gz")
    suffix = f".{name.rpartition('.')[2]}"
    return KINDS.get(suffix, suffix if suffix in OTHER_KINDS else None)
