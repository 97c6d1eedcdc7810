"""Speed and memory of glow.py and bnaf.py beside other implementations of the same models, and beside the machine.

    python -m pip install -r requirements.txt -r requirements-bench.txt
    python benchmarks/speed.py                 on a GPU if there is one; under nine minutes on two CPU cores
    python benchmarks/speed.py --quick         a minute, to see that it runs: its figures say little

Writes speed.json, speed.md and scaling.png. README.md beside it says what the columns mean and how shapes match.
"""

import argparse
import contextlib
import gc
import io
import json
import math
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from contenders import PEERS, SCRIPTS, bisect, build, contend, is_installed, offered
from report import draw_growth, markdown
from targets import CHECKPOINT_TIME, OVERHEAD, absolute_checks, target_of
from timing import (
    in_turn,
    machine_name,
    measure_peaks,
    out_of_memory_is_said,
    prefer_tf32,
    progress,
    quartiles,
    synchronize,
)

# A row's shape; n_levels as in glow.py, one less than the paper's L.
GLOW = {
    'a': dict(image_size=32, n_levels=2, depth=8, width=128, batch_size=16),
    'b': dict(image_size=64, n_levels=2, depth=8, width=256, batch_size=8),
    'c': dict(image_size=64, n_levels=2, depth=32, width=512, batch_size=2),
}
ON_GPU = {
    f'{name}{n}': dict(image_size=64, n_levels=n_levels, depth=depth, width=width, batch_size=n)
    for name, n_levels, depth, width in (('A', 3, 32, 512), ('B', 3, 24, 256), ('C', 4, 48, 512))
    for n in (16, 32, 64)
}
TABLE = dict(n_flows=5, n_hidden=1, batch_size=200)
BNAF = {
    'a': dict(data_dim=2, n_flows=1, n_hidden=1, hidden_dim=50, batch_size=200),
    'b': dict(TABLE, data_dim=6, hidden_dim=40),
    'b2': dict(TABLE, data_dim=6, hidden_dim=40, batch_size=2000),
    'c': dict(TABLE, data_dim=43, hidden_dim=10),
    'd': dict(TABLE, data_dim=63, hidden_dim=20),
}
INVERTED = {
    'b': 20,
    'c': 20,
}  # of which BNAFs rows are inverted, and how many: bisection takes its time
VARIANTS = {
    'glow': {
        'cpu': ('float32', 'bf16', 'compile', 'checkpoint_grads'),
        'cuda': (
            'float32',
            'bf16',
            'compile',
            'bf16 compile',
            'checkpoint_grads',
            'bf16 checkpoint_grads',
        ),
    },
    'bnaf': {'cpu': ('float32', 'compile'), 'cuda': ('float32', 'compile')},
}
# Compiling takes longer than measuring, and memory a process each: not for every row
COMPILED = {
    'cpu': {'glow': ('a', 'b'), 'bnaf': ('b', 'b2')},
    'cuda': {'glow': ('a', 'b', 'c', 'A16'), 'bnaf': tuple(BNAF)},
}
MEASURED_MEMORY = {'glow': (*GLOW, *ON_GPU), 'bnaf': ('b2', 'c')}
SMALLEST = {
    'glow': dict(image_size=8, n_levels=1, depth=1, width=8, batch_size=2),
    'bnaf': dict(data_dim=2, n_flows=2, n_hidden=1, hidden_dim=2, batch_size=2),
}

# How cost grows: a base shape, and what each number of it is changed to, the others as they are.
SWEEPS = {
    'glow': (
        dict(image_size=32, n_levels=2, depth=4, width=64, batch_size=4),
        dict(
            depth=(1, 2, 4, 8, 16, 32),
            width=(16, 32, 64, 128, 256, 512),
            image_size=(16, 32, 64, 128),
            batch_size=(1, 2, 4, 8, 16, 32),
        ),
    ),
    'bnaf': (
        dict(TABLE, data_dim=16, hidden_dim=16),
        dict(
            data_dim=(2, 4, 8, 16, 32, 64),
            hidden_dim=(4, 8, 16, 32, 64),
            batch_size=(50, 200, 800, 3200),
        ),
    ),
}

# The real commands: options, and the step after which a run is cut short. The table is noise, as large as MINIBOONE.
COMMANDS = {
    'quick': {
        'glow': ('--dataset=digits --depth=2', 10),
        'bnaf': ('--n_epochs=1 --n_flows=1 --batch_size=4000', None),
    },
    'cpu': {'glow': ('--dataset=faces', 100), 'bnaf': ('--n_epochs=1', None)},
    'cuda': {
        'glow': (
            '--dataset=faces --image_size=64 --n_levels=3 --depth=32 --width=512 --batch_size=16 --lr=1e-4',
            600,
        ),
        'bnaf': ('--n_epochs=1', None),
    },
}
TABLE_SHAPE = (36_488, 43)


# --------------------------------------------------------------------------------------------------------- rows


def variants_of(script, config, device, quick):
    compiled = not quick and config in COMPILED[device.type][script]
    return [
        name
        for name in VARIANTS[script][device.type]
        if offered(script, name) and (compiled or 'compile' not in name.split())
    ]


def functions_of(quantity, script, config, contenders, device):
    """-> name -> what is timed; nothing where the quantity is not measured of this row"""
    if quantity == 'training':
        return {name: c.step for name, c in contenders.items()}
    batch = {
        name: c for name, c in contenders.items() if 'checkpoint_grads' not in name.split()
    }  # training's alone
    if quantity == 'evaluation':
        functions = {name: c.evaluate for name, c in batch.items()}
    elif script == 'glow':
        functions = {name: c.sample for name, c in batch.items()}
    elif config in INVERTED:
        own = {name: c.model for name, c in batch.items() if name not in PEERS[script]}
        z = own['float32'](torch.randn(INVERTED[config], own['float32'].data_dim, device=device))[
            0
        ].detach()
        functions = {
            'bisection': lambda: bisect(own['float32'], z),
            **{name: partial(model.inverse, z) for name, model in own.items()},
        }
    else:
        functions = {}
    return {name: torch.no_grad()(function) for name, function in functions.items()}


def gflop_of(quantity, contender):
    """-> GFLOP of one call, forward and backward in training, of products of matrices and convolutions"""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(quantity == 'training'):
        if quantity == 'training':
            contender.objective().backward()
        else:
            {'evaluation': contender.evaluate, 'sampling': contender.sample}[quantity]()
    return counter.get_total_flops() / 1e9


def measure(script, config, shape, device, peaks, peers, quick):
    """-> the results of one row: training steps, evaluation and sampling, of the peers and of our variants in turn"""
    contenders, results = {}, []
    for name in [*peers, *variants_of(script, config, device, quick)]:
        with out_of_memory_is_said(f'{script} {config} {name}'):
            contenders[name] = contend(script, shape, name, device)
    for quantity, budget in (('training', 8), ('evaluation', 2), ('sampling', 4)):
        for contender in contenders.values():
            contender.model.train(quantity == 'training')
        functions = functions_of(quantity, script, config, contenders, device)
        if not functions:
            continue
        times = in_turn(functions, device, budget / 20 if quick else budget, 2 if quick else 3)
        few = 'bisection' in times
        row = {
            'script': script,
            'config': config,
            'quantity': quantity,
            'shape': shape,
            'gflop': None,
            'n': INVERTED[config] if few else shape['batch_size'],
            'unit': 'images' if script == 'glow' else 'rows',
        }
        if 'float32' in times and not few:  # how many steps an inverse takes is its own affair
            row['gflop'] = gflop_of(quantity, contenders['float32'])
        row['entries'] = entries_of(
            row, times, 'bisection' if few else PEERS[script][0], peaks, device.type
        )
        for entry in row['entries']:
            model = (
                contenders.get(entry['name']) or contenders['float32']
            ).model  # bisection inverts ours
            entry['parameters'] = sum(p.numel() for p in model.parameters())
        results.append(row)
        if quantity == 'training':
            progress(
                f'{script} {config} parameters: '
                + ', '.join(f'{entry["name"]} {entry["parameters"]:,}' for entry in row['entries'])
            )
        progress(
            f'{script} {config} {quantity}: '
            + ', '.join(
                f'{entry["name"]} {entry["per_second"]:.4g} {row["unit"]}/s'
                for entry in row['entries']
            )
        )
    return results


def entries_of(row, times, peer, peaks, kind):
    """-> one result a contender; ratios are taken round by round, then their quartiles"""
    entries = []
    for name, seconds in times.items():
        median = float(np.median(seconds))
        entry = {
            'name': name,
            'seconds': median,
            'per_second': row['n'] / median,
            'ratio': None,
            'target': None,
            'met': None,
        }
        entry['gflops'] = row['gflop'] and row['gflop'] / median
        peak = peaks['gemm_bf16_gflops' if 'bf16' in name else 'gemm_float32_gflops']
        entry['fraction'] = entry['gflops'] and entry['gflops'] / peak
        if peer in times and name != peer:
            entry['ratio'] = quartiles([p / s for p, s in zip(times[peer], seconds)])
        if name not in PEERS[row['script']] and name != peer:
            entry['target'] = target_of(kind, row['script'], row['quantity'], row['config'], name)
            if entry['target'] and entry['ratio']:
                entry['met'] = entry['ratio'][1] >= entry['target']
        plain = ' '.join(word for word in name.split() if word != 'checkpoint_grads') or 'float32'
        if plain != name and plain in times:
            entry['time_over_plain'] = median / float(np.median(times[plain]))
        entries.append(entry)
    return entries


# ------------------------------------------------------------------------------------------------------- memory


def peak_mib():
    """The most memory this process has had. Not resource.getrusage's ru_maxrss, which starts at the parent's."""
    status = Path('/proc/self/status').read_text()
    return int(status.split('VmHWM:')[1].split()[0]) / 1024


def print_memory(script, shape, name):
    """In a process of its own: MiB of training steps; on a CPU, less what imports, libraries and the model had taken"""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    prefer_tf32()
    contend(
        script, SMALLEST[script], name, device
    ).step()  # what is loaded when first used is loaded now
    build(script, shape, name)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    before = peak_mib()
    contender = contend(script, shape, name, device)
    for _ in range(2):
        contender.step()
    synchronize(device)
    print(
        torch.cuda.max_memory_allocated() / 2**20 if device.type == 'cuda' else peak_mib() - before
    )


def memory_of(script, shape, name):
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', __file__, '--memory', json.dumps([script, shape, name])],
        capture_output=True,
        text=True,
    )
    if 'OutOfMemoryError' in done.stderr:
        return math.inf
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def measure_memory(script, config, shape, device, peers, quick, rows):
    """-> peak memory of a row's training steps; compiling itself takes more than the steps on a CPU, so not there"""
    names = [
        name
        for name in variants_of(script, config, device, quick)
        if device.type == 'cuda' or 'compile' not in name.split()
    ]
    timed = {
        entry['name']: entry
        for row in rows
        if row['quantity'] == 'training'
        for entry in row['entries']
    }
    row = {'script': script, 'config': config, 'shape': shape, 'entries': []}
    peer = PEERS[script][0]
    for name in [*[peer] * (peer in peers), *names]:
        entry = {
            'name': name,
            'mib': memory_of(script, shape, name),
            'ratio': None,
            'target': None,
            'met': None,
        }
        if name != peer:
            entry['ratio'] = entry['mib'] / row['entries'][0]['mib'] if peer in peers else None
            entry['target'] = target_of(device.type, script, 'memory', config, name)
            if entry['target'] and entry['ratio'] is not None:
                entry['met'] = entry['ratio'] <= entry['target']
        entry['time_over_plain'] = timed.get(name, {}).get('time_over_plain')
        entry['time_met'] = entry['time_over_plain'] and entry['time_over_plain'] <= CHECKPOINT_TIME
        row['entries'].append(entry)
    progress(
        f'{script} {config} memory: '
        + ', '.join(f'{e["name"]} {e["mib"]:.0f} MiB' for e in row['entries'])
    )
    return row


# -------------------------------------------------------------------------------------- real command, growth


def measure_command(script, words, n_steps, device):
    """Runs the script's own main --train -> images or rows a second over a cycle from validation to validation, and the
    share of it that is not steps. Steps are timed from outside; the run is cut short after n_steps, then validates."""
    module, marks, ends, said = SCRIPTS[script], [], [], io.StringIO()
    take_step, save = module.Training.take_step, module.save_checkpoint

    def timed_step(run):
        if n_steps:
            run.last_step = n_steps
        start = time.perf_counter()
        result = take_step(run)
        synchronize(device)
        marks.append((start, time.perf_counter(), run))
        return result

    def timed_save(*args):
        save(*args)
        ends.append(time.perf_counter())

    module.Training.take_step, module.save_checkpoint = timed_step, timed_save
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
        ):
            if script == 'bnaf':
                np.save(
                    f'{folder}/noise.npy',
                    np.random.default_rng(0).normal(size=TABLE_SHAPE).astype(np.float32),
                )
                words = f'--dataset=noise.npy {words}'
            arguments = words.replace('noise.npy', f'{folder}/noise.npy').split()
            module.main(['--train', f'--output_dir={folder}', *arguments])
    except SystemExit:
        raise RuntimeError(said.getvalue()) from None
    finally:
        module.Training.take_step, module.save_checkpoint = take_step, save
    starts, stops = np.array([mark[:2] for mark in marks[len(marks) // 5 :]]).T  # warm by then
    step, gap = np.median(stops - starts), np.mean(starts[1:] - stops[:-1])
    run = marks[0][2]
    epoch = run.steps_per_epoch
    cycle = epoch * math.ceil(module.VALIDATE_STEPS / epoch) if script == 'glow' else epoch
    outside = (
        cycle * gap + ends[-1] - stops[-1]
    )  # what follows the last step is a validation and a checkpoint
    seconds = cycle * step + outside
    share, target = float(outside / seconds), OVERHEAD[device.type]
    result = {
        'script': script,
        'words': words,
        'n_steps': len(marks),
        'step_seconds': float(step),
        'per_second': float(cycle * run.config.batch_size / seconds),
        'overhead': share,
        'target': target,
        'met': share < target,
    }
    progress(
        f'{script}.py --train {words}: {result["per_second"]:.4g} a second, {share:.1%} outside of steps'
    )
    return result


def measure_growth(script, device, quick):
    """-> {number of the shape: [(value, seconds of a training step), ...]}"""
    base, sweeps = SWEEPS[script]
    growth = {}
    for key, values in sweeps.items():
        growth[key] = []
        for value in values[:2] if quick else values:
            step = contend(script, {**base, key: value}, 'float32', device).step
            times = in_turn({'step': step}, device, 0.1 if quick else 0.6)['step']
            growth[key].append((value, float(np.median(times))))
        progress(
            f'{script} growth with {key}: '
            + ', '.join(f'{v}: {1e3 * s:.3g} ms' for v, s in growth[key])
        )
    return growth


# --------------------------------------------------------------------------------------------------------- main


def describe(device, quick):
    packages = {'normflows': 'normflows', 'pyro': 'pyro-ppl', 'zuko': 'zuko'}
    versions = {
        peer: metadata.version(package) for peer, package in packages.items() if is_installed(peer)
    }
    return {
        'kind': device.type,
        'device': machine_name(),
        'torch': torch.__version__,
        'peers': versions,
        'quick': quick,
    }


def run(scripts, only_rows, quick, device):
    """-> everything measured, as the JSON holds it"""
    results = {
        'machine': describe(device, quick),
        'peaks': measure_peaks(device, quick),
        'rows': [],
        'memory': [],
        'commands': [],
        'growth': {},
        'absolute': [],
    }
    progress(
        results['machine']['device']
        + ': '
        + ', '.join(f'{k} {v:.4g}' for k, v in results['peaks'].items())
    )
    for script in scripts:
        peers = [peer for peer in PEERS[script] if peer in results['machine']['peers']]
        for peer in PEERS[script]:
            if peer not in peers:
                print(f'{peer} is not installed (requirements-bench.txt): its columns stay empty')
        shapes = BNAF if script == 'bnaf' else {**GLOW, **(ON_GPU if device.type == 'cuda' else {})}
        chosen = only_rows or list(shapes)[: 1 if quick else None]
        for config in (name for name in shapes if name in chosen):
            rows = measure(script, config, shapes[config], device, results['peaks'], peers, quick)
            results['rows'] += rows
            gc.collect()  # models of one row at a time
            torch.compiler.reset()
            if device.type == 'cuda':
                torch.cuda.empty_cache()
            if quick or config in MEASURED_MEMORY[script]:
                results['memory'].append(
                    measure_memory(script, config, shapes[config], device, peers, quick, rows)
                )
        results['growth'][script] = measure_growth(script, device, quick)
        options, n_steps = COMMANDS['quick' if quick else device.type][script]
        for extra in ['', ' --bf16'] if script == 'glow' and offered(script, 'bf16') else ['']:
            results['commands'].append(measure_command(script, options + extra, n_steps, device))
    if device.type == 'cuda':
        results['absolute'] = absolute_checks(results['rows'], results['memory'])
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--only', default='glow,bnaf', help='one of the two scripts')
    parser.add_argument(
        '--rows', default='', help='some of the shapes, such as a,c,A16 (default: all)'
    )
    parser.add_argument('--quick', action='store_true', help='the first shape of each script, once')
    parser.add_argument(
        '--out',
        default=Path(__file__).parent,
        type=Path,
        metavar='DIR',
        help='where the results go',
    )
    parser.add_argument(
        '--memory', type=json.loads, help=argparse.SUPPRESS
    )  # a process of measure_memory's
    args = parser.parse_args(argv)
    if args.memory:
        return print_memory(*args.memory)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    prefer_tf32()
    scripts, rows = (text.split(',') if text else [] for text in (args.only, args.rows))
    results = run([script for script in SCRIPTS if script in scripts], rows, args.quick, device)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'speed.json').write_text(json.dumps(results, indent=1) + '\n')
    (args.out / 'speed.md').write_text(markdown(results))
    draw_growth(results['growth'], SWEEPS).savefig(args.out / 'scaling.png', dpi=120)
    progress(f'wrote speed.json, speed.md and scaling.png to {args.out}')


if __name__ == '__main__':
    main()
