"""Options of a program: fields of dataclasses, checked wherever their values come from.

A script has two such dataclasses: a config, which a checkpoint keeps, and a request, which holds
for one call of the program. The command line and ``--help`` are made from their fields.

To add an option, add a field to ``Config`` or ``Request`` of a script, or to ``RunRequest`` here
for both scripts. Enter its name in ``MODE_OPTIONS`` of the script: that of a request under the
modes that take it, that of a config under those in which it may differ from the checkpoint.
"""

import argparse
import math
import os
import re
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar

from .errors import UserError, UserErrorParser

GROUPS = {
    'data': 'data',
    'model': 'model (with a checkpoint, its own values apply)',
    'optimization': 'optimization',
    'run': 'runs and processes (torchrun or torch.distributed.launch starts several)',
    'output': 'output',
}
OPTIONS_OF_EVERY_MODE = ('output_dir', 'restore_file', 'device', 'distributed')
LONGEST_LIST = 2**16
Defaults = dict[str, dict[str, Any]]  # of each data set: {option: value}


def option(
    group: str,
    default: Any,
    help: str,
    low: float = 0,
    high: float = 1e18,
    choices: tuple[str, ...] = (),
) -> Any:
    """Return a dataclass field that is an option of the command line.

    Arguments:
        group: one of ``GROUPS``, under which ``--help`` lists it.
        default: its default, which is not checked; None stands for "not given".
        help: what it is, in the words of ``--help``.
        low, high: bounds of a number, or of each number in a list; both are allowed values.
        choices: the allowed values of a text, if not all are.
    """
    has_no_default = default in (None, '') or default is False
    if not has_no_default and '(default' not in help:
        help = f'{help} [{default}]'
    metadata = {
        'group': group,
        'help': help,
        'low': low,
        'high': high,
        'choices': choices,
    }
    return field(default=default, metadata=metadata)


@dataclass
class Options:
    """A dataclass whose values have the types of their fields and lie within their bounds."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not f.default:
                check_value(f, value)


def check_value(f: Field, value: Any) -> None:
    """Raise ``UserError`` unless an option may have this value."""
    if f.type in (str, bool, list):
        texts = value if isinstance(value, list) else [value]
        is_text = len(texts) <= LONGEST_LIST
        is_text = is_text and all(isinstance(text, str) and text.isprintable() for text in texts)
        is_printable = is_text or f.type is bool
        if type(value) is not f.type or not is_printable:
            raise UserError(f'--{f.name}={value!r} is not printable text or has the wrong type')
        choices = f.metadata['choices']
        if choices and value not in choices:
            raise UserError(f'--{f.name}={value} must be one of {", ".join(choices)}')
        return

    is_list = f.type == list[float]
    number_type = float if is_list else f.type
    numbers = value if is_list else [value]
    low, high = f.metadata['low'], f.metadata['high']
    for number in numbers:
        is_right_type = type(number) is number_type
        if not (is_right_type and low <= number <= high and number < math.inf):
            raise UserError(f'--{f.name}={value!r} is outside {low}..{high}')


@dataclass
class RunRequest(Options):
    """Options of one call that every script has."""

    output_dir: str = option('run', 'results', 'a run gets a folder of its own in it')
    restore_file: str = option(
        'run', '', 'checkpoint to load (default: that of the newest run; with --train, none)'
    )
    resume: bool = option(
        'run', False, 'go on with the newest run in output_dir if there is one, else start one'
    )
    max_skips: int = option(
        'run',
        20,
        'steps in a row that may be skipped because gradients are not finite, before training ends',
    )
    detect_anomaly: bool = option(
        'run',
        False,
        'slow: stop at the first NaN in a backward pass and name the operation it came from',
    )
    device: str = option(
        'run', '', 'cpu or cuda (default: a GPU if there is one)', choices=('cpu', 'cuda')
    )
    distributed: bool = option('run', False, 'accepted without effect: the launcher decides')

    def require_consistency(self, mode: str) -> None:
        """Raise ``UserError`` where an option has no effect because of the others."""


# ------------------------------------------------------------------------------------ command line

OptionsT = TypeVar('OptionsT', bound=Options)


@dataclass(frozen=True)
class CommandLine:
    """The command line of a script.

    Attributes:
        script: the file name of the script.
        description: the text on top of ``--help``.
        modes: each mode, and what it does in the words of ``--help``. One must be given.
        mode_options: the options that each mode takes, beside ``OPTIONS_OF_EVERY_MODE``. All
            others are the checkpoint's own. Training without a checkpoint takes the whole config.
        config_class: the dataclass of the options that a checkpoint keeps.
        request_class: the dataclass of the options of one call.
        defaults: the defaults that a data set changes.
    """

    script: str
    description: str | None
    modes: dict[str, str]
    mode_options: dict[str, set[str]]
    config_class: type[Options]
    request_class: type[RunRequest]
    defaults: Defaults

    def parse(self, argv: Sequence[str]) -> tuple[str, dict[str, Any], Any]:
        """Return the mode, the options of the config that were given, and the request.

        Raises ``UserError`` for an unknown option or an impossible value, and for an option of
        the request that the mode does not take. Options of the config are checked by
        ``resolve_config``, once the checkpoint is known.
        """
        # a leading space keeps a list such as -2,-1,0 from being taken for an option
        words = [f' {word}' if re.match(r'-[\d.]', word) else word for word in argv]
        args = vars(self.build_parser().parse_args(words))

        mode = args['mode']
        given = explicit_options(self.request_class, args)
        for name in given:
            self.require_taken(name, mode)
        request = self.request_class(**given)
        request.require_consistency(mode)
        return mode, explicit_options(self.config_class, args), request

    def require_taken(self, name: str, mode: str) -> None:
        """Raise ``UserError`` where a mode does not take an option of the request."""
        if name in OPTIONS_OF_EVERY_MODE or name in self.mode_options[mode]:
            return
        takers = [f'--{other}' for other, names in self.mode_options.items() if name in names]
        raise UserError(f'--{name} goes with {" or ".join(takers)}, not with --{mode}')

    def build_parser(self) -> UserErrorParser:
        """Build the parser. Options that were not given are None in its result."""
        parser = UserErrorParser(
            f'python {self.script}',
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            epilog=f'{self.modes_table()}\n\n{defaults_table(self.defaults)}',
        )
        # torch.distributed.launch passes the second spelling, older versions of it the first
        parser.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)

        group = parser.add_argument_group('mode, one of')
        choice = group.add_mutually_exclusive_group(required=True)
        for mode, help in self.modes.items():
            choice.add_argument(
                f'--{mode}', action='store_const', const=mode, dest='mode', help=help
            )

        groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
        for f in (*fields(self.config_class), *fields(self.request_class)):
            arguments: dict[str, Any] = {'help': f.metadata['help'], 'default': None}
            if f.type is bool:
                arguments['action'] = 'store_true'
            elif f.type in (int, float, str):
                arguments.update(type=f.type, metavar='X')
            else:
                arguments.update(nargs='+', metavar='X')
            groups[f.metadata['group']].add_argument(f'--{f.name}', **arguments)
        return parser

    def modes_table(self) -> str:
        """Return the lines of ``--help`` that say which mode takes which options."""
        lines = [
            'With a checkpoint, each mode takes these options; the checkpoint brings the rest:'
        ]
        lines.append(f'  every mode: {" ".join(OPTIONS_OF_EVERY_MODE)}')
        for mode, names in self.mode_options.items():
            text = f'--{mode}: {" ".join(sorted(names))}'
            lines.append(textwrap.fill(text, 98, initial_indent='  ', subsequent_indent='      '))
        return '\n'.join(lines)


def defaults_table(defaults: Defaults) -> str:
    """Return the lines of ``--help`` that say which defaults a data set changes."""
    datasets_of: dict[str, list[str]] = {}
    for name, values in defaults.items():
        words = [
            f'{key}={value:.3g}' if isinstance(value, float) else f'{key}={value}'
            for key, value in values.items()
        ]
        text = ' '.join(words)
        datasets_of.setdefault(text, []).append(name)

    lines = ['Defaults are in brackets. These data sets change some of them:']
    for text, names in datasets_of.items():
        if text:
            line = f'{", ".join(names)}: {text}'
            lines.append(textwrap.fill(line, 98, subsequent_indent='  '))
    return '\n'.join(lines)


def explicit_options(config_class: type[Options], args: dict[str, Any]) -> dict[str, Any]:
    """Return the options of ``config_class`` that were given on the command line.

    Raises ``UserError`` where a list is empty or holds something other than numbers.
    """
    options = {}
    for f in fields(config_class):
        value = args[f.name]
        if value is None:
            continue
        if f.type in (list, list[float]):
            value = parse_list(f, value)
        elif f.type is str and value.startswith('~'):
            value = os.path.expanduser(value)  # shells leave it alone in --name=~/file
        options[f.name] = value
    return options


def parse_list(f: Field, arguments: list[str]) -> list:
    """Split ``8,20`` and ``8 20`` alike. Names may contain spaces, numbers may not."""
    text = ','.join(arguments)
    if f.type == list[float]:
        text = text.replace(' ', ',')
    words = [word.strip() for word in text.split(',') if word.strip()]

    if not words:
        raise UserError(f'--{f.name} is empty')
    if f.type is list:
        return words
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise UserError(f'--{f.name} takes numbers, not {" ".join(words)}') from error


def resolve_config(
    config_class: type[OptionsT],
    options: dict[str, Any],
    defaults: Defaults,
    saved: dict[str, Any] | None,
    may_change: Collection[str],
) -> OptionsT:
    """Return the config of a run.

    Given ``options`` come first, then those of the checkpoint ``saved`` or, without one, the
    defaults of the data set, then those of ``config_class``. Raises ``UserError`` where an option
    contradicts the checkpoint and is not in ``may_change``.
    """
    if saved is None:
        defaults_of_class = {f.name: f.default for f in fields(config_class)}
        dataset = options.get('dataset', defaults_of_class['dataset'])
        return config_class(**{**defaults.get(dataset, {}), **options})

    config: OptionsT = saved['config']
    for name in options.keys() - may_change:
        saved_value = getattr(config, name)
        if options[name] != saved_value:
            raise UserError(
                f'--{name}={as_typed(options[name])} contradicts the checkpoint {saved["path"]}, '
                f'which has {name}={as_typed(saved_value)}'
            )
    return replace(config, **options)


def as_typed(value: Any) -> str:
    """Return the value of an option as it is typed: a list as words with commas between them."""
    if value is None:
        return 'none'
    return ','.join(map(str, value)) if isinstance(value, list) else str(value)
