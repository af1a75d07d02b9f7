"""TL101: a config key that nothing reads."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainlint.contract import Finding, Key, NotApplicable, NotObserved, Recording, Severity, check
from trainlint.recording.describe import place, plural
from trainlint.recording.schema import ConfigFacts, ConfigKey, ConfigRead, NameMention, OptimizerStep, Value

#: Takers that only show or store a section.
_DUMPS = frozenset(("print", "logging", "pickle", "json.dump", "yaml.dump", "save_hyperparameters", "logger", "wandb"))
#: Keys named in one finding; a section with more gives several.
_MOST = 8
#: Settings that other checks hold against what the run does: TL104, and TL404 for the rate in the log.
_JUDGED_ELSEWHERE = frozenset(
    """learning_rate weight_decay betas beta1 beta2 eps momentum schedule warmup_steps warmup_epochs warmup_ratio
    min_lr min_lr_ratio precision bf16 fp16 accumulation clip_norm clip_value batch_size max_steps epochs seed
    log_lr""".split()
)
#: Words of keys that are read after the watched steps, often by code that is imported only then.
_LATER = re.compile(
    r"(?:^|[._\[\]])(?:eval|evaluation|evaluate|test|testing|val|valid|validation|predict|prediction|infer|inference|"
    r"export|generate|generation|sample|sampling|save|saving|checkpoint|checkpoints|checkpointing|ckpt|final|best|output|"
    r"early_stopping|early_stop|patience|report|plot|viz|visualization|deploy|push|hub|publish|metrics|benchmark|resume|"
    r"submit|upload|artifact|artifacts)(?=$|[._\[\]])"
)
#: What frameworks take from a file themselves.
_FRAMEWORK_KEYS = re.compile(
    r"(?:^|\.)(?:defaults|_target_|_partial_|_convert_|_recursive_|_args_|_self_|_component_|class_path|init_args)(?:$|[.\[])"
    r"|^hydra(?:\.|$)"
)


@check("TL101", Recording, severity="warning")
def unused_config_key(run: Recording) -> Iterator[Finding]:
    """A config key that nothing reads.

    ## What goes wrong
    The key looks like a setting and decides nothing: it is misspelled, its code was removed, or it travels along in
    `**kwargs` to a constructor that drops what it does not know. Someone tunes it, compares runs by it, and reports
    it as part of the recipe.

    ## How it is detected
    The live config object is followed in the watched program, whether it is a dict from YAML, JSON or TOML, an
    OmegaConf container, a Hydra composition or an argparse namespace: `cfg["lr"]`, `cfg.lr`, `cfg.get("lr")`,
    `"lr" in cfg` are reads of one key. `**cfg`, `items()`, `asdict`, `save_hyperparameters()`, YAML dumps and tracker
    uploads take a whole section and prove nothing.

    A key is reported when it was never read and stands nowhere in the program's own source in a form that could read
    it later (in quotes, after a dot, or put together from pieces); or when it was only taken in bulk and no loaded
    source file, libraries included, mentions its name at all. A library's mention does not count where `**cfg` went
    into the program's own function or constructor, and that hands its keywords to no library.

    ## What to do
    Remove the key, or correct its name: where the program looked for a similar one, the finding says so. If it should
    have an effect, pass it on to the code that needs it.

    ## When it may be wrong
    The run is stopped after a few optimizer steps. A key that only later code reads is not reported when loaded source
    mentions it, and keys that speak of evaluation, saving or export are left out, because that code may be imported
    later. A section that was not read key by key may have been handed to compiled code (pydantic): it is reported only
    when no source mentions its names. A section whose names are data (weights by class, a list of data sets) is told
    by code that goes through this section alone, or by the fact that no name in it is known; it is left out. A
    compiled extension or a subprocess that reads the file again is not seen.
    Learning rate, schedule and the other settings of TL104 are judged there, against what the run does. Keys without a
    value (`null`, empty) are not reported, and keys of an installed package's own config files only as info.

    ## References
    Hydra and plain YAML accept unknown keys; so do TRL's scripts, axolotl, torchtune and timm's config files.
    """
    config = run.config
    if config is None or not config.keys:
        raise NotApplicable("no config was named and none was seen in the program")
    followed = [k for k in config.keys if k.reads is not None]
    if not followed and config.tracked_by:
        raise NotObserved(f"the config is read by a library's own parser ({config.tracked_by}), which is not followed")
    if not followed:
        raise NotObserved(
            "the config object was not recognised in the program, so reads of its keys were not seen; recognised are "
            "yaml, json and tomllib loads of the named file, OmegaConf, Hydra and argparse"
        )
    if not any(isinstance(e, OptimizerStep) for e in run.events):
        raise NotObserved("the program was ended before its first optimizer step, and keys may be read up to there")
    if config.mentions is None and any(not k.reads or _bulk_only(k) for k in followed):
        raise NotObserved("the source files that the program loaded are not known, so names could not be looked up")
    mentions = {m.name: m for m in config.mentions or ()}
    sections = _Sections(followed, mentions)
    unused = [u for k in followed if _a_setting(k) and (u := _unused(k, mentions, sections)) is not None]
    for group in _groups(unused):
        yield _finding(run, config, group)


@dataclass(frozen=True)
class _Unused:
    key: ConfigKey
    #: It was taken in bulk at least once.
    bulk: bool
    #: It belongs to a config file that came with an installed package: not the user's own words.
    shipped: bool


def _a_setting(key: ConfigKey) -> bool:
    """Whether the key is a setting that somebody gave, and that no other check or framework answers for."""
    if key.origin == "default" or key.meaning in _JUDGED_ELSEWHERE or _FRAMEWORK_KEYS.search(key.path):
        return False
    if key.value is None or key.value == () or (key.type == "dict" and key.value == "{}"):
        return False
    return not _LATER.search(key.path.lower())


def _bulk_only(key: ConfigKey) -> bool:
    return all(read.how == "bulk" for read in key.reads or ())


def _name(key: ConfigKey) -> str:
    """The last name of a key, without list indices and quotes."""
    bare = re.sub(r"(?:\[\d+\])+$", "", key.path)
    quoted = re.search(r'\["((?:[^"\\]|\\.)*)"\]$', bare)
    return quoted.group(1) if quoted else bare.rpartition(".")[2]


def _section(path: str) -> str:
    return re.sub(r"(?:\[\d+\])+$", "", path).rpartition(".")[0]


class _Sections:
    """What is known of the sections that keys stand in."""

    def __init__(self, followed: Sequence[ConfigKey], mentions: dict[str, NameMention]) -> None:
        #: Sections of which a key was read one by one: reads of their other keys would have been seen.
        self.read_by_key = {_section(k.path) for k in followed if k.reads and not _bulk_only(k)}
        #: Sections of which some key's name is known to the program.
        self.known = self.read_by_key | {
            _section(k.path) for k in followed if (m := mentions.get(_name(k))) is not None and m.own and m.files
        }
        self._taken: dict[tuple[str, str, int], set[str]] = {}
        for k in followed:
            for read in k.reads or ():
                self._taken.setdefault(_by(read), set()).add(_section(k.path))

    def names_are_data(self, key: ConfigKey) -> bool:
        """Whether the program goes through this very section (names of data sets, of classes), not through all."""
        section = _section(key.path)
        if not section:
            return False
        return any(r.by in _LOOPS and self._taken[_by(r)] == {section} for r in key.reads or ())


#: Ways to go through a section in which its names may be the data.
_LOOPS = frozenset(("items()", "values()", "keys()", "popitem()", "a loop over the section"))


def _by(read: ConfigRead) -> tuple[str, str, int]:
    return (read.by, read.at.file, read.at.line) if read.at is not None else (read.by, "", 0)


def _unused(key: ConfigKey, mentions: dict[str, NameMention], sections: _Sections) -> _Unused | None:
    if not _bulk_only(key):
        return None
    mention = mentions.get(_name(key))
    if mention is None:
        return None
    shipped = key.origin == "file" and key.at is not None and "site-packages" in key.at.file
    if key.reads:
        known = mention.files and (mention.own or not _stays_with_the_program(key))
        if known or sections.names_are_data(key) or _section(key.path) not in sections.known:
            return None
        return _Unused(key, True, shipped)
    if mention.files and (mention.own and mention.access or _section(key.path) not in sections.read_by_key):
        return None
    return _Unused(key, False, shipped)


#: Takers that write a section down and hand nothing on.
_WRITTEN = frozenset(("print", "pprint", "logging", "logger", "json.dump", "yaml.dump", "save_hyperparameters"))


def _stays_with_the_program(key: ConfigKey) -> bool:
    """Whether no library was handed the key: it went into the program's own functions, and was written down."""
    ways = key.reads or ()
    written = {r.by for r in ways} & (_WRITTEN | {"OmegaConf.save", "OmegaConf.to_yaml"})
    return any(r.kept for r in ways) and all(r.kept or r.by in written for r in ways)


def _groups(unused: Sequence[_Unused]) -> Iterator[list[_Unused]]:
    """Keys of one section and one kind together, in the order of the config."""
    grouped: dict[tuple[bool, bool, str], list[_Unused]] = {}
    for found in unused:
        section = "" if found.shipped else _section(found.key.path)
        grouped.setdefault((found.shipped, found.bulk and not found.shipped, section), []).append(found)
    for (shipped, _, _), members in grouped.items():
        size = len(members) if shipped else _MOST
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _finding(run: Recording, config: ConfigFacts, group: Sequence[_Unused]) -> Finding:
    keys = [u.key for u in group]
    shipped = group[0].shipped
    shown = keys if not shipped else keys[:_MOST]
    named = ", ".join(f"{k.path} = {_value(k)}{_where(k)}" for k in shown)
    if len(shown) < len(keys):
        named += f" and {plural(len(keys) - len(shown), 'more key')}"
    it, they, stands = ("its name", "It was", "stands") if len(keys) == 1 else ("their names", "They were", "stand")
    sources = plural(len(run.program.sources), "loaded source file")
    if any(u.bulk for u in group):
        inside = any(_stays_with_the_program(k) for k in keys)
        looked = f"nothing in the program's own source reads {it} from it" if inside else ""
        looked = looked or f"none of the {sources} mentions {it}"
        how = f"{they} only taken in bulk ({_takers(keys)}), and {looked}."
    else:
        how = f"{they} never read in the watched steps, and {it} {stands} nowhere in code that could run later."
    subject = "Nothing uses" if any(u.bulk for u in group) else "Nothing reads"
    owner = " These keys come with the installed package, not from you." if shipped else ""
    meant = _meant(config, keys)
    return Finding(
        f"{subject} {named}. {how}{owner}{meant}",
        at=Key(keys[0].path),
        evidence={
            "keys": [
                {
                    "key": k.path,
                    "value": list(k.value) if isinstance(k.value, tuple) else k.value,
                    "file": k.at.file if k.at else None,
                    "line": k.at.line if k.at else None,
                    "taken_by": [f"{r.by} at {place(r.at) or 'unknown'}" for r in k.reads or ()],
                }
                for k in keys
            ],
            "tracked_by": config.tracked_by,
            "source_files": len(run.program.sources),
        },
        fix=_fix(keys, shipped),
        severity=Severity.INFO if shipped else None,
        about=" ".join(sorted(k.path for k in keys)),
    )


def _value(key: ConfigKey) -> str:
    return _text(key.value)


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_text(v) for v in value[:6]) + (", ...]" if len(value) > 6 else "]")
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _where(key: ConfigKey) -> str:
    if key.at is not None:
        return f" ({place(key.at)})"
    return " (command line)" if key.origin == "override" else ""


def _takers(keys: Sequence[ConfigKey]) -> str:
    """``** at model.py:30, OmegaConf.to_yaml at train.py:40``: at most three, passing on before mere dumps."""
    found: dict[str, bool] = {}
    for key in keys:
        for read in key.reads or ():
            dump = read.by in _DUMPS or read.by.startswith("OmegaConf.")
            found.setdefault(f"{read.by}{' at ' + place(read.at) if read.at else ''}", dump)
    ordered = sorted(found, key=lambda text: found[text])
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more


def _meant(config: ConfigFacts, keys: Sequence[ConfigKey]) -> str:
    """A key that the program looked for in the same section and did not find, and that is spelled alike."""
    said = []
    for key in keys:
        section = _section(key.path)
        looked = {m.path.rpartition(".")[2]: m for m in config.missing if _section(m.path) == section}
        close = difflib.get_close_matches(_name(key), list(looked), n=1, cutoff=0.75)
        if close:
            missing = looked[close[0]]
            default = f" and went on with {_text(missing.default)}" if missing.default is not None else ""
            said.append(f" The program looked for {missing.path} ({place(missing.at)}), did not find it{default}.")
    return "".join(said[:2])


def _fix(keys: Sequence[ConfigKey], shipped: bool) -> str:
    if shipped:
        return "Nothing to do, unless you meant to use one of them: setting it changes nothing."
    what = "the key" if len(keys) == 1 else "them"
    return f"Remove {what}, correct the name, or pass the value to the code that should use it."
