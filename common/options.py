"""What a program can be asked for: dataclasses whose fields are its options, with their bounds, wherever they come from."""

import math
import re
import textwrap
from dataclasses import dataclass, field, fields, replace

from .errors import UserError

GROUPS = {
    'data': 'data',
    'model': 'model (a checkpoint knows its own)',
    'optimisation': 'optimisation',
    'run': 'runs and processes (torchrun or torch.distributed.launch start them)',
    'output': 'output',
}


def option(group, default, text, low=0, high=1e18, choices=()):
    """-> a field of Options; its bounds, included in what it may be, are those of each number where it holds a list of them"""
    shown = (
        '' if default in (None, '') or default is False or '(default' in text else f' [{default}]'
    )
    return field(
        default=default,
        metadata=dict(group=group, help=text + shown, low=low, high=high, choices=choices),
    )


class Options:
    """A dataclass whose values are of their fields' types and within their bounds."""

    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata['low'], f.metadata['high']
            if value is f.default:
                continue
            if f.type in (str, bool, list):
                if type(value) is not f.type or f.type is str and not value.isprintable():
                    raise UserError(
                        f'--{f.name}={value!r} is not printable text or has the wrong type'
                    )
                if f.metadata['choices'] and value not in f.metadata['choices']:
                    raise UserError(
                        f'--{f.name}={value} must be one of {", ".join(f.metadata["choices"])}'
                    )
                continue
            kind, numbers = (float, value) if f.type == list[float] else (f.type, [value])
            if not all(
                type(number) is kind and low <= number <= high and number < math.inf
                for number in numbers
            ):
                raise UserError(f'--{f.name}={value!r} is outside {low}..{high}')


def parse(parser, argv, modes, kind, request, defaults):
    """What argparse's parser finds in argv -> one of the modes, {name: value} of those options of a kind that were given,
    and the request, of a kind of its own. defaults: {data set: {name: value}}, for --help"""

    def fail(message):
        raise UserError(f'{message} (see python {parser.prog} --help)')

    parser.error, parser.allow_abbrev = fail, False
    own = {}
    for name, values in defaults.items():
        own.setdefault(' '.join(f'{key}={value:.3g}' for key, value in values.items()), []).append(
            name
        )
    parser.epilog = (
        'In brackets: defaults. Data sets have their own of some of them:\n'
        + '\n'.join(
            textwrap.fill(f'{", ".join(names)}: {text}', 110, subsequent_indent='  ')
            for text, names in own.items()
            if text
        )
    )
    one_of = parser.add_argument_group('mode, one of').add_mutually_exclusive_group(required=True)
    for mode, text in modes.items():
        one_of.add_argument(f'--{mode}', action='store_const', const=mode, dest='mode', help=text)
    groups = {name: parser.add_argument_group(text) for name, text in GROUPS.items()}
    for f in (*fields(kind), *fields(request)):
        how = (
            dict(action='store_true', default=None)
            if f.type is bool
            else dict(
                metavar='X',
                **(dict(type=f.type) if f.type in (int, float, str) else dict(nargs='+')),
            )
        )
        groups[f.metadata['group']].add_argument(f'--{f.name}', help=f.metadata['help'], **how)
    # a leading space keeps a list such as -2,-1,0 from being taken for an option
    args = vars(
        parser.parse_args([f' {word}' if re.match(r'-[\d.]', word) else word for word in argv])
    )
    return args['mode'], explicit_options(kind, args), request(**explicit_options(request, args))


def explicit_options(kind, args):
    """-> {name: value} of those options of a kind that are among args and were given, lists of words taken apart"""
    values = {f.name: args[f.name] for f in fields(kind) if args[f.name] is not None}
    for f in fields(kind):
        if f.name in values and f.type in (list, list[float]):  # 8,20 is 8 20
            text = (
                ','.join(values[f.name])
                if f.type is list
                else ','.join(values[f.name]).replace(' ', ',')
            )
            words = [word.strip() for word in text.split(',') if word.strip()]
            try:
                values[f.name] = words if f.type is list else [float(word) for word in words]
            except ValueError:
                raise UserError(f'--{f.name} takes numbers, not {" ".join(words)}') from None
            if not words:
                raise UserError(f'--{f.name} is empty')
    return values


def resolve_config(kind, values, defaults, saved, may_change):
    """-> the options of a kind that were given over those of the checkpoint or, without one, over defaults, the data sets'.
    UserError where one of them contradicts the checkpoint and is none of those that may change."""
    if saved is None:
        return kind(**{**defaults.get(values.get('dataset', kind.dataset), {}), **values})
    for name in values.keys() - may_change:
        if values[name] != getattr(saved['config'], name):
            raise UserError(
                f'--{name}={values[name]} contradicts the checkpoint {saved["path"]}, '
                f'which has {name}={getattr(saved["config"], name)}'
            )
    return replace(saved['config'], **values)


@dataclass
class RunRequest(Options):
    """What the command line asks of any training, for this run of the program only"""

    output_dir: str = option('run', 'results', 'a run gets a folder of its own in it')
    restore_file: str = option(
        'run', '', 'a checkpoint (default: of the newest run; to train, none)'
    )
    resume: bool = option(
        'run', False, 'go on with the newest run in output_dir if there is one, else start one'
    )
    max_skips: int = option(
        'run',
        20,
        'steps in a row that may be skipped for gradients that are not finite, before it stops',
    )
    detect_anomaly: bool = option(
        'run', False, 'slow: name the operation that gave the first gradient that is not finite'
    )
    distributed: bool = option('run', False, 'accepted, but the launcher decides')
