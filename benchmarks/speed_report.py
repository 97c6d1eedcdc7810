"""What is asked of speed and memory, and what speed.py measured: as tables and as a figure."""

import math
from itertools import product

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from pages import significant, table

TITLES = {'glow': 'Glow', 'bnaf': 'BNAF'}
QUANTITIES = {'training': 'training step', 'evaluation': 'evaluation', 'sampling': 'sampling'}
PEAKS = {
    'gemm_float32_gflops': 'product of matrices, float32: GFLOP/s',
    'gemm_bf16_gflops': 'product of matrices, bf16: GFLOP/s',
    'conv3x3_float32_gflops': '3x3 convolution of 128 channels, float32: GFLOP/s',
    'conv3x3_bf16_gflops': '3x3 convolution of 128 channels, bf16: GFLOP/s',
    'copy_gb_s': 'copy: GB/s',
}
LABELS = {
    'depth': 'depth (steps of flow per level)',
    'width': 'width of the coupling networks',
    'image_size': 'image size (pixels per side)',
    'batch_size': 'batch size',
    'data_dim': 'variables',
    'hidden_dim': 'hidden units per variable',
}

# ----------------------------------------------------------------------------------------- targets

# Lower bounds on ratios of speed and upper bounds on ratios of memory, by script, quantity and
# precision, option or state of the allocator; a dict where they differ from shape to shape.
TARGETS = {
    'cpu': {
        ('glow', 'training', 'float32'): dict(a=1.4, b=1.5, c=1.3),
        ('glow', 'training', 'bf16'): dict(a=1.9, b=2.4, c=2.0),
        ('glow', 'sampling', 'float32'): 1.5,
        ('glow', 'memory', 'float32'): 0.7,
        ('glow', 'memory', 'checkpoint_grads'): 0.35,
        ('bnaf', 'training', 'warm'): dict(a=3.0, b=4.0, b2=5.0, c=2.5, d=3.0),
        ('bnaf', 'training', 'fresh'): dict(a=3.0, b=4.0, b2=16.0, c=2.5, d=3.0),
        ('bnaf', 'memory', 'float32'): dict(b2=0.6),
        ('bnaf', 'sampling', 'float32'): dict(c=10.0),
    },
    'cuda': {
        ('glow', 'training', 'float32'): dict(A16=2.0),
        ('glow', 'training', 'bf16 compile'): dict(A16=6.0, A64=4.0),
        ('glow', 'sampling', 'float32'): dict(A16=3.0),
        ('glow', 'memory', 'float32'): 0.7,
        ('glow', 'memory', 'checkpoint_grads'): 0.35,
        ('bnaf', 'training', 'float32'): dict(a=10.0, b=10.0, b2=15.0, c=10.0, d=10.0),
        ('bnaf', 'memory', 'float32'): dict(b2=0.3),
        ('bnaf', 'sampling', 'float32'): dict(c=20.0),
    },
}
# Upper bound on the share of a run that is not steps.
OVERHEAD = {'cpu': 0.03, 'cuda': 0.05}
# Upper bound on the time of a step with checkpoint_grads over one without.
CHECKPOINT_TIME = 1.35
# Bounds on single figures of one GPU: shape, option, key of the figure, bound, whether a lower one.
FIGURES_ON_GPU = [
    ('A16', 'bf16', 'per_second', 650, True),
    ('A64', 'bf16', 'per_second', 1300, True),
    ('C16', 'checkpoint_grads', 'mib', 12 * 1024, False),
]
# The states of the allocator that training of BNAF is measured in on a CPU.
STATES = {'': '', 'warm': ', allocator warm', 'fresh': ', fresh processes'}


def target_of(
    device: str,
    script: str,
    quantity: str,
    config: str,
    variant: str,
    state: str = '',
) -> float | None:
    """Return the target of one of our variants, such as ``'bf16 compile'``, if it has one."""
    words = variant.split()
    if 'eager' in words:
        return None
    # Options are faster ways to the same result: at least as much is asked of them.
    precisions = ['bf16', 'float32'] if 'bf16' in words else ['float32']
    if 'checkpoint_grads' in words:
        keys = ['checkpoint_grads']
    elif state:
        keys = [state]
    elif 'compile' in words:
        keys = [f'{precisions[0]} compile', *precisions]
    else:
        keys = precisions

    for key in keys:
        target = TARGETS[device].get((script, quantity, key))
        if isinstance(target, dict):
            target = target.get(config)
        if target is not None:
            return target
    return None


def check_figures(rows: list[dict], memory: list[dict]) -> list[dict]:
    """Compare the best measured value of each of FIGURES_ON_GPU with its bound."""
    rows = [row for row in rows if row['quantity'] == 'training']
    checks = []
    for config, option, key, bound, at_least in FIGURES_ON_GPU:
        entries = [e for row in rows + memory if row['config'] == config for e in row['entries']]
        values = [entry.get(key) for entry in entries if option in entry['name'].split()]
        values = [value for value in values if value is not None]
        if not values:
            continue

        value = max(values) if at_least else min(values)
        checks.append(
            {
                'what': f'{config}, {option}: {key}',
                'value': value,
                'target': bound,
                'at_least': at_least,
                'met': value >= bound if at_least else value <= bound,
            }
        )
    return checks


# ------------------------------------------------------------------------------------------- cells


def ratio_cell(ratio: float | None) -> str:
    if ratio is None or math.isinf(ratio):
        return significant(ratio)
    return f'{significant(ratio)}x'


def quartiles_cell(quartiles: list[float] | None) -> str:
    if quartiles is None:
        return ''
    low, median, high = (significant(value) for value in quartiles)
    return f'{median}x ({low} to {high})'


def verdict_cell(met: bool | None) -> str:
    if met is None:
        return ''
    return 'met' if met else '**missed**'


def target_cell(measured: str, target: str, met: bool) -> str:
    return f'{measured} / {target}' + ('' if met else ' **missed**')


def shape_cell(row: dict) -> str:
    """Name a row's shape, and how many items where they are fewer than its batch."""
    text = f'{row["config"]}: {shape_text(row["script"], row["shape"])}'
    if row.get('n', row['shape']['batch_size']) != row['shape']['batch_size']:
        text += f'; {row["n"]} {row["unit"]}'
    return text


def shape_text(script: str, shape: dict) -> str:
    if script == 'glow':
        size = shape['image_size']
        model = f'{shape["n_levels"]} splits, depth {shape["depth"]}, width {shape["width"]}'
        return f'3x{size}x{size}, {model}, batch {shape["batch_size"]}'

    n_flows = shape['n_flows']
    flows = f'{n_flows} flow{"s" if n_flows > 1 else ""}'
    width = shape['data_dim'] * shape['hidden_dim']
    layers = f'{shape["n_hidden"] + 1} hidden layers of {width}'
    return f'{shape["data_dim"]}-d, {flows}, {layers}, batch {shape["batch_size"]}'


# ------------------------------------------------------------------------------------------ tables


def format_report(results: dict) -> str:
    """Return speed.md: everything measured, as tables."""
    parts = [heading(results['machine']), peaks_table(results['peaks'])]
    parts.append('### Targets\n\n' + targets_table(results))

    if results['failures']:
        parts.append('### Not measured\n\n' + failures_table(results['failures']))

    peers = results['machine']['peers']
    for script in TITLES:
        rows = [row for row in results['rows'] if row['script'] == script]
        for quantity, state in product(QUANTITIES, STATES):
            measured = [row for row in rows if (row['quantity'], row['state']) == (quantity, state)]
            if measured:
                parts.append(speed_table(script, quantity, state, measured, peers))
        memory = [row for row in results['memory'] if row['script'] == script]
        if memory:
            parts.append(memory_table(script, memory, peers))

    if results['commands']:
        parts.append('### The real commands\n\n' + commands_table(results['commands']))
    if results['absolute']:
        parts.append('### Targets of single figures\n\n' + figures_table(results['absolute']))
    if results['growth']:
        parts.append('![How the cost of a training step grows](scaling.png)\n')
    return '\n'.join(parts)


def heading(machine: dict) -> str:
    versions = [f'{name} {version}' for name, version in machine['peers'].items()]
    versions = ', '.join(versions) or 'no peers installed'
    text = f'## Speed and memory on {machine["device"]}\n\ntorch {machine["torch"]}, {versions}.'
    if machine['kind'] == 'cuda' and 'cpu' in machine:
        text += f' The CPU beside it: {machine["cpu"]}, {machine["threads"]} threads.'
    if machine['quick']:
        text += ' **A quick run: its figures say little.**'
    return text + '\n'


def peaks_table(peaks: dict[str, float]) -> str:
    lines = [[PEAKS[key], significant(value)] for key, value in peaks.items()]
    return table(['the machine itself', ''], lines)


def targets_table(results: dict) -> str:
    """Set what was measured beside what was asked: a line per shape, a column per variant."""
    lines = {}  # {(what, against): {variant: cell}}
    for row in results['rows'] + results['memory']:
        # The first entry of a row is the one that the ratios of the others are to.
        against = row['entries'][0]['name']
        is_speed = 'quantity' in row
        quantity = 'training: memory'
        if is_speed:
            quantity = QUANTITIES[row['quantity']] + STATES[row['state']]
        what = f'{TITLES[row["script"]]} {quantity}, {row["config"]}: '
        what += shape_text(row['script'], row['shape'])
        for entry in row['entries']:
            if entry['met'] is None:
                continue
            ratio = entry['ratio'][1] if is_speed else entry['ratio']
            cell = target_cell(ratio_cell(ratio), f'{entry["target"]:g}x', entry['met'])
            lines.setdefault((what, against), {})[entry['name']] = cell

    for command in results['commands']:
        words = command['words'].removesuffix(' --bf16')
        what = f'`{command["script"]}.py --train {words}`: time outside of steps'
        variant = 'bf16' if '--bf16' in command['words'] else 'float32'
        measured, target = f'{command["overhead"]:.1%}', f'{command["target"]:.0%}'
        cell = target_cell(measured, target, command['met'])
        lines.setdefault((what, ''), {})[variant] = cell

    variants = list(dict.fromkeys(name for cells in lines.values() for name in cells))
    rows = []
    for (what, against), cells in lines.items():
        targets = [cells.get(name, '') for name in variants]
        rows.append([what, against, *targets])
    return table(['what', 'against', *variants], rows)


def targets_section(results: dict) -> str:
    """Return what README.md shows: the machine, the versions and the targets."""
    machine = results['machine']
    versions = [f'{name} {version}' for name, version in machine['peers'].items()]
    versions = ', '.join([f'torch {machine["torch"]}', *versions])
    text = f'Measured on {machine["device"]}, with {versions}.'
    if machine['quick']:
        text += ' **A quick run: its figures say little.**'
    return f'{text}\n\n{targets_table(results)}'


def speed_table(
    script: str,
    quantity: str,
    state: str,
    rows: list[dict],
    peers: dict[str, str],
) -> str:
    """Return one line per contender, under a heading; a row's first is what ratios are to."""
    lines = []
    for row in rows:
        for k, entry in enumerate(row['entries']):
            is_ours = entry['name'] not in (*peers, 'bisection')
            fraction = entry['fraction']
            lines.append(
                [
                    shape_cell(row) if k == 0 else '',
                    f'**ours**, {entry["name"]}' if is_ours else entry['name'],
                    f'{entry["parameters"]:,}',
                    significant(entry['per_second']),
                    quartiles_cell(entry['ratio']),
                    ratio_cell(entry['target']),
                    verdict_cell(entry['met']),
                    significant(entry['gflops']),
                    '' if fraction is None else f'{fraction:.0%}',
                ]
            )
    header = ['shape', 'who', 'parameters', f'{rows[0]["unit"]}/s', 'speed ratio (quartiles)']
    header += ['target', '', 'GFLOP/s', 'of the GEMM peak']
    title = f'{TITLES[script]}: {QUANTITIES[quantity]}{STATES[state]}'
    return f'### {title}\n\n' + table(header, lines)


def memory_table(script: str, rows: list[dict], peers: dict[str, str]) -> str:
    """Return one line per contender, under a heading; a row's first is what ratios are to."""
    lines = []
    for row in rows:
        for k, entry in enumerate(row['entries']):
            is_ours = entry['name'] not in peers
            lines.append(
                [
                    shape_cell(row) if k == 0 else '',
                    f'**ours**, {entry["name"]}' if is_ours else entry['name'],
                    significant(entry['mib']),
                    ratio_cell(entry['ratio']),
                    ratio_cell(entry['target']),
                    verdict_cell(entry['met']),
                    ratio_cell(entry['time_over_plain']),
                    verdict_cell(entry['time_met']),
                ]
            )
    header = ['shape', 'who', 'MiB', 'memory ratio', 'target', '', 'time over that without it', '']
    return f'### {TITLES[script]}: peak memory of training\n\n' + table(header, lines)


def commands_table(commands: list[dict]) -> str:
    lines = []
    for command in commands:
        lines.append(
            [
                f'`{command["script"]}.py --train {command["words"]}`',
                significant(command['per_second']),
                significant(1e3 * command['step_seconds']),
                f'{command["overhead"]:.1%}',
                f'under {command["target"]:.0%}',
                verdict_cell(command['met']),
            ]
        )
    header = ['command', 'images or rows per second', 'ms per step', 'outside of steps']
    return table([*header, 'target', ''], lines)


def figures_table(checks: list[dict]) -> str:
    lines = []
    for check in checks:
        bound = 'at least' if check['at_least'] else 'at most'
        target = f'{bound} {significant(check["target"])}'
        measured = significant(check['value'])
        lines.append([check['what'], measured, target, verdict_cell(check['met'])])
    return table(['what', 'measured', 'target', ''], lines)


def failures_table(failures: list[dict]) -> str:
    # A bar would end a cell.
    lines = [[entry['what'], entry['error'].replace('|', '/')] for entry in failures]
    return table(['what', 'why'], lines)


# ------------------------------------------------------------------------------------------ figure


def draw_growth(growth: dict, sweeps: dict) -> Figure:
    """Draw the time of a training step against each number of a shape, one row per script.

    ``growth`` holds for each script ``{number of the shape: [(value, seconds), ...]}``, and
    ``sweeps`` the shape whose numbers were changed.
    """
    n_columns = max(len(curves) for curves in growth.values())
    figure = Figure(figsize=(13, 3.4 * len(growth)), layout='constrained')
    panels = figure.subplots(len(growth), n_columns, squeeze=False, sharey='row')
    for row, (script, curves) in zip(panels, growth.items()):
        for axes in row[len(curves) :]:
            axes.set_axis_off()
        for axes, (name, points) in zip(row, curves.items()):
            draw_curve(axes, points)
            axes.set_xlabel(LABELS[name])

        row[0].set_ylabel(f'{TITLES[script]}: ms per training step')
        base_shape, _ = sweeps[script]
        title = f'{TITLES[script]}, around {shape_text(script, base_shape)}'
        row[0].set_title(title, loc='left', fontsize=10)
    figure.supxlabel('dotted: in proportion, through the last point', fontsize=9, color='grey')
    return figure


def draw_curve(axes: Axes, points: list[tuple[float, float]]) -> None:
    """Draw milliseconds against a number of the shape, on logarithmic axes."""
    values = [value for value, _ in points]
    times = [1e3 * seconds for _, seconds in points]
    in_proportion = [times[-1] * value / values[-1] for value in values]
    axes.loglog(values, times, 'o-', color='tab:blue')
    axes.loglog(values, in_proportion, ':', color='grey', linewidth=1)

    growth = math.log(times[-1] / times[-2])
    power = growth / math.log(values[-1] / values[-2])
    text = f'in the end as power {power:.1f}'
    axes.annotate(text, (0.04, 0.9), xycoords='axes fraction', fontsize=9)

    axes.set_xticks(values, [str(value) for value in values])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
