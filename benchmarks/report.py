"""speed.py's results as tables and as a figure."""

import math

import matplotlib

matplotlib.use('Agg')
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

TITLES = {'glow': 'Glow', 'bnaf': 'BNAF'}
PEAKS = {
    'gemm_float32_gflops': 'product of matrices, float32: GFLOP/s',
    'gemm_bf16_gflops': 'product of matrices, bf16: GFLOP/s',
    'conv3x3_float32_gflops': '3x3 convolution of 128 channels, float32: GFLOP/s',
    'conv3x3_bf16_gflops': '3x3 convolution of 128 channels, bf16: GFLOP/s',
    'copy_gb_s': 'copy: GB/s',
}
QUANTITIES = {'training': 'training step', 'evaluation': 'evaluation', 'sampling': 'sampling'}
LABELS = {
    'depth': 'depth (steps of flow a level)',
    'width': 'width of the coupling networks',
    'image_size': 'image size (pixels a side)',
    'batch_size': 'batch',
    'data_dim': 'variables',
    'hidden_dim': 'hidden units a variable',
}


def significant(value):
    """Three significant digits, without an exponent: 0.0123, 4.56, 1,230"""
    if value is None or not math.isfinite(value):
        return '' if value is None else 'out of memory'
    if value == 0:
        return '0'
    digits = 2 - math.floor(math.log10(abs(value)))
    return f'{round(value, digits):,.{max(0, digits)}f}'


def verdict(met):
    return '' if met is None else 'met' if met else '**missed**'


def table(header, rows):
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines) + '\n'


def insert(page, script, text):
    """Puts text between the marks that a page has for what a script writes"""
    before, mark, rest = page.read_text().partition(f'<!-- what {script} wrote -->')
    _, end, after = rest.partition('<!-- until here -->')
    if not end:
        raise ValueError(f'{page} has no <!-- what {script} wrote --> ... <!-- until here -->')
    page.write_text(f'{before}{mark}\n\n{text}\n{end}{after}')


def shape_text(script, shape):
    if script == 'glow':
        return (
            f'3x{shape["image_size"]}x{shape["image_size"]}, {shape["n_levels"]} splits, depth {shape["depth"]}, '
            f'width {shape["width"]}, batch {shape["batch_size"]}'
        )
    flows = f'{shape["n_flows"]} flow' + 's' * (shape['n_flows'] > 1)
    return (
        f'{shape["data_dim"]}-d, {flows}, {shape["n_hidden"] + 1} hidden layers of '
        f'{shape["data_dim"] * shape["hidden_dim"]}, batch {shape["batch_size"]}'
    )


def speed_table(script, quantity, rows, peers):
    """One line a contender; the first of a row is who the ratios are to"""
    lines = []
    for row in rows:
        for k, entry in enumerate(row['entries']):
            ratio = (
                ''
                if entry['ratio'] is None
                else '{1}x ({0} to {2})'.format(*map(significant, entry['ratio']))
            )
            few = f'; {row["n"]} {row["unit"]}' if row['n'] != row['shape']['batch_size'] else ''
            shown = f'{row["config"]}: {shape_text(script, row["shape"])}{few}' if k == 0 else ''
            name = (
                entry['name']
                if entry['name'] in (*peers, 'bisection')
                else f'**ours**, {entry["name"]}'
            )
            lines.append(
                [
                    shown,
                    name,
                    f'{entry["parameters"]:,}',
                    significant(entry['per_second']),
                    ratio,
                    significant(entry['target']) + 'x' * (entry['target'] is not None),
                    verdict(entry['met']),
                    significant(entry['gflops']),
                    '' if entry['fraction'] is None else f'{entry["fraction"]:.0%}',
                ]
            )
    unit = rows[0]['unit']
    return f'### {TITLES[script]}: {QUANTITIES[quantity]}\n\n' + table(
        [
            'shape',
            'who',
            'parameters',
            f'{unit}/s',
            'speed ratio (quartiles)',
            'target',
            '',
            'GFLOP/s',
            'of the GEMM peak',
        ],
        lines,
    )


def memory_table(script, rows, peers):
    lines = []
    for row in rows:
        for k, entry in enumerate(row['entries']):
            target = '' if entry['target'] is None else f'{significant(entry["target"])}x'
            time = entry['time_over_plain']
            lines.append(
                [
                    f'{row["config"]}: {shape_text(script, row["shape"])}' if k == 0 else '',
                    entry['name'] if entry['name'] in peers else f'**ours**, {entry["name"]}',
                    significant(entry['mib']),
                    '' if entry['ratio'] is None else f'{significant(entry["ratio"])}x',
                    target,
                    verdict(entry['met']),
                    '' if time is None else f'{significant(time)}x',
                    verdict(entry['time_met']),
                ]
            )
    return f'### {TITLES[script]}: peak memory of training\n\n' + table(
        ['shape', 'who', 'MiB', 'memory ratio', 'target', '', 'time over that without it', ''],
        lines,
    )


def targets_table(results):
    """What was aimed at, and what came of it: one line for each shape, one column for each variant of ours"""
    lines = {}  # {(what, against): {variant: 'measured of target'}}

    def put(what, against, name, measured, target, met):
        lines.setdefault((what, against), {})[name] = f'{measured} of {target}' + ' **missed**' * (
            not met
        )

    for row in (*results['rows'], *results['memory']):
        peer = row['entries'][0][
            'name'
        ]  # the first entry of a row is who the others are compared to
        what = f'{TITLES[row["script"]]} {QUANTITIES[row["quantity"]] if "quantity" in row else "training: memory"}'
        for entry in row['entries']:
            if entry['met'] is not None:
                ratio = entry['ratio'][1] if 'quantity' in row else entry['ratio']
                put(
                    f'{what}, {row["config"]}: {shape_text(row["script"], row["shape"])}',
                    peer,
                    entry['name'],
                    f'{significant(ratio)}x',
                    f'{entry["target"]:g}x',
                    entry['met'],
                )
    for command in results['commands']:
        put(
            f'`{command["script"]}.py --train {command["words"].removesuffix(" --bf16")}`: time outside of steps',
            '',
            'bf16' if '--bf16' in command['words'] else 'float32',
            f'{command["overhead"]:.1%}',
            f'{command["target"]:.0%}',
            command['met'],
        )
    names = list(dict.fromkeys(name for cells in lines.values() for name in cells))
    return table(
        ['what', 'against', *names],
        [[*line, *(cells.get(name, '') for name in names)] for line, cells in lines.items()],
    )


def markdown(results):
    machine, peers = results['machine'], results['machine']['peers']
    versions = (
        ', '.join(f'{name} {version}' for name, version in peers.items()) or 'no peers installed'
    )
    parts = [
        f'## Speed and memory on {machine["device"]}\n\ntorch {machine["torch"]}, {versions}.'
        + (' **A quick run: its figures say little.**' if machine['quick'] else '')
        + '\n',
        table(
            ['the machine itself', ''],
            [[PEAKS[key], significant(value)] for key, value in results['peaks'].items()],
        ),
        '### Targets\n\n' + targets_table(results),
    ]
    for script in TITLES:
        for quantity in QUANTITIES:
            rows = [
                row
                for row in results['rows']
                if (row['script'], row['quantity']) == (script, quantity)
            ]
            if rows:
                parts.append(speed_table(script, quantity, rows, peers))
        rows = [row for row in results['memory'] if row['script'] == script]
        if rows:
            parts.append(memory_table(script, rows, peers))
    parts.append(
        '### The real commands\n\n'
        + table(
            ['command', 'images or rows a second', 'ms a step', 'outside of steps', 'target', ''],
            [
                [
                    f'`{c["script"]}.py --train {c["words"]}`',
                    significant(c['per_second']),
                    significant(1e3 * c['step_seconds']),
                    f'{c["overhead"]:.1%}',
                    f'under {c["target"]:.0%}',
                    verdict(c['met']),
                ]
                for c in results['commands']
            ],
        )
    )
    if results['absolute']:
        parts.append(
            '### Targets of single figures\n\n'
            + table(
                ['what', 'measured', 'target', ''],
                [
                    [
                        c['what'],
                        significant(c['value']),
                        ('at least ' if c['at_least'] else 'at most ') + significant(c['target']),
                        verdict(c['met']),
                    ]
                    for c in results['absolute']
                ],
            )
        )
    parts.append('![How the cost of a training step grows](scaling.png)\n')
    return '\n'.join(parts)


def draw_growth(growth, sweeps):
    """-> Figure: ms of a training step against each number of a shape, on log axes; one row of panels a script"""
    figure = Figure(figsize=(13, 3.4 * len(growth)), layout='constrained')
    axes = figure.subplots(
        len(growth), max(len(of) for of in growth.values()), squeeze=False, sharey='row'
    )
    for row, (script, of) in zip(axes, growth.items()):
        for axis in row[len(of) :]:
            axis.set_axis_off()
        for axis, (key, points) in zip(row, of.items()):
            values, times = zip(*points)
            times = [1e3 * t for t in times]
            axis.loglog(values, times, 'o-', color='tab:blue')
            axis.loglog(
                values, [times[-1] * v / values[-1] for v in values], ':', color='grey', linewidth=1
            )
            power = math.log(times[-1] / times[-2]) / math.log(values[-1] / values[-2])
            axis.annotate(
                f'in the end as power {power:.1f}',
                (0.04, 0.9),
                xycoords='axes fraction',
                fontsize=9,
            )
            axis.set_xticks(values, [str(v) for v in values])
            axis.xaxis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel(LABELS[key])
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f'{TITLES[script]}: ms a training step')
        base = shape_text(script, sweeps[script][0])
        row[0].set_title(f'{TITLES[script]}, around {base}', loc='left', fontsize=10)
    figure.supxlabel('dotted: in proportion, through the last point', fontsize=9, color='grey')
    return figure
