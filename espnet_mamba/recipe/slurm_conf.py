"""``conf/slurm.conf`` in the syntax of Kaldi's slurm.pl, which ESPnet's recipes use: options become sbatch's words."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class SlurmConf:
    """The lines of one file."""

    path: str
    command: list[str] = field(default_factory=lambda: ["sbatch"])
    options: list[tuple[str, str, str]] = field(default_factory=list)  # (name, value or "*", words with $0)
    defaults: dict[str, str] = field(default_factory=dict)

    def knows(self, name: str) -> bool:
        """Whether a line says what the option is to sbatch."""
        return any(option == name for option, _, _ in self.options)

    def words(self, given: Mapping[str, str]) -> list[str]:
        """Return sbatch and its options for ``given`` (such as ``{"mem": "4G", "gpu": "2"}``) over the defaults.

        A line for the very value stands before a line for ``*``, whose ``$0`` is the value.

        Raises:
            ValueError: the file has no line for an option that was given.
        """
        words, values = list(self.command), self.defaults | dict(given)
        order = list(dict.fromkeys([name for name, _, _ in self.options] + sorted(values)))  # later lines win in sbatch
        for name in order:
            if name not in values:
                continue
            value = values[name]
            lines = {key: text for option, key, text in self.options if option == name}
            text = lines.get(value, lines.get("*"))
            if text is None:
                raise ValueError(f"{self.path}: no line for --{name} {value}; add: option {name}=* --{name} $0")
            words += shlex.split(text.replace("$0", value))
        return words


def read_slurm_conf(path: str | Path) -> SlurmConf:
    """Read the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that is none of ``command``, ``option name=value words`` and ``default name=value``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it says which partition and options jobs get")
    conf = SlurmConf(str(path))
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        kind, _, rest = line.split("#")[0].strip().partition(" ")
        setting, _, text = rest.strip().partition(" ")
        name, equals, value = setting.partition("=")
        if not kind:
            continue
        if kind == "command" and rest:
            conf.command = shlex.split(rest)
        elif kind == "option" and equals:
            conf.options.append((name, value, text))
        elif kind == "default" and equals:
            conf.defaults[name] = value
        else:
            raise ValueError(
                f"{path}:{number}: '{line}' is none of: command ..., option name=value ..., default name=value"
            )
    return conf
