"""Options of the official code, which README.md translates into those of glow.py."""

import re
from pathlib import Path

import pytest
from helpers import only
from tiny_models import training_words

import glow
from common.options import as_typed

README = Path(glow.__file__).with_name('README.md').read_text()
NAMES = {
    'flow_permutation',
    'flow_coupling',
    'ycond',
    'weight_y',
    'learntop',
    'n_bits_x',
    'eps_std',
}


def translations():
    """Return the two cells of each row of the table."""
    _, _, table = README.partition('| openai/glow | `glow.py` |\n| --- | --- |\n')
    rows, _, _ = table.partition('\n\n')
    return [line.strip('| ').split(' | ') for line in rows.splitlines()]


def our_options():
    """Return the options of the right column, each once."""
    cells = ' '.join(ours for _, ours in translations())
    return list(dict.fromkeys(re.findall(r'`(--[^`]+)`', cells)))


def test_every_choice_of_the_official_code_is_translated():
    official = ' '.join(theirs for theirs, _ in translations())
    assert all(name in official for name in NAMES)
    choices = [
        f'--{name}={value}'
        for name in ('coupling', 'permutation')
        for value in option_choices(name)
    ]
    assert set(choices) <= set(our_options())


def option_choices(name):
    """Return the values that an option may have."""
    return glow.Config.__dataclass_fields__[name].metadata['choices']


@pytest.mark.parametrize('option', our_options())
def test_an_option_of_the_official_code_trains(option, tmp_path):
    """It is kept in the checkpoint, and the model is read back and scored."""
    words = option.split()
    training = [] if '--generate' in words else words
    glow.main(training_words(tmp_path, '--condition=classes', '--batch_size=256', *training))
    best = only(tmp_path.glob('*/best.pt'))
    if not training:
        glow.main([*words, f'--output_dir={tmp_path}'])
        assert only(tmp_path.glob('*/generated_samples_at_z_std_0.7.png'))
        return

    name, _, value = option.removeprefix('--').partition('=')
    saved = glow.load_checkpoint(best)
    assert as_typed(getattr(saved['config'], name)) == (value or 'True')
    assert saved['step'] == 6 and best.with_name('results.json').exists()
