"""What is asked of speed and memory: least ratios of speed, largest ratios of memory, a few figures of one GPU."""

# By script, quantity and option; by row where rows differ
TARGETS = {
    'cpu': {
        ('glow', 'training', 'float32'): dict(a=1.5, b=1.5, c=1.3),
        ('glow', 'training', 'compile'): 1.8,
        ('glow', 'training', 'bf16'): 2.0,
        ('glow', 'sampling', 'float32'): 1.5,
        ('glow', 'memory', 'float32'): 0.7,
        ('glow', 'memory', 'checkpoint_grads'): 0.35,
        ('bnaf', 'training', 'float32'): dict(a=5.0, b=5.0, b2=18.0, c=2.5, d=2.0),
        ('bnaf', 'memory', 'float32'): dict(b2=0.6),
        ('bnaf', 'sampling', 'float32'): dict(c=10.0),
    },
    'cuda': {
        ('glow', 'training', 'float32'): 2.0,
        ('glow', 'training', 'bf16'): 4.0,
        ('glow', 'sampling', 'float32'): 4.0,
        ('glow', 'memory', 'float32'): 0.7,
        ('glow', 'memory', 'checkpoint_grads'): 0.35,
        ('bnaf', 'training', 'float32'): dict(a=10.0, b=10.0, b2=15.0, c=10.0, d=10.0),
        ('bnaf', 'memory', 'float32'): dict(b2=0.3),
        ('bnaf', 'sampling', 'float32'): dict(c=20.0),
    },
}
OVERHEAD = {'cpu': 0.03, 'cuda': 0.05}  # share of a run that is not steps, at most
CHECKPOINT_TIME = 1.35  # of a step with checkpoint_grads over one without, at most
# Of single rows on a GPU: row, option, what, bound, whether it is the least or the most
ABSOLUTE = [
    ('A16', 'bf16', 'per_second', 2000, True),
    ('A16', 'bf16', 'fraction', 0.25, True),
    ('C16', 'checkpoint_grads', 'mib', 12 * 1024, False),
]


def target_of(kind, script, quantity, config, variant):
    """-> the target of one of our variants, such as 'bf16 compile', or None"""
    option = next(
        (word for word in ('checkpoint_grads', 'bf16', 'compile') if word in variant.split()),
        'float32',
    )
    target = TARGETS[kind].get((script, quantity, option))
    if target is None and option in (
        'bf16',
        'compile',
    ):  # what is asked of float32 is asked of these too
        target = TARGETS[kind].get((script, quantity, 'float32'))
    return target.get(config) if isinstance(target, dict) else target


def absolute_checks(rows, memory):
    """-> the best of each of ABSOLUTE that was measured, and whether it is met"""
    checks = []
    for config, option, key, bound, at_least in ABSOLUTE:
        values = [
            entry[key]
            for row in (*rows, *memory)
            if row['config'] == config and row.get('quantity', 'training') == 'training'
            for entry in row['entries']
            if option in entry['name'].split() and entry.get(key) is not None
        ]
        if values:
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
