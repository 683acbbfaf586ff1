"""The engine against traces of the published code (see test/data/README.md)."""
import json
from pathlib import Path
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip('torch')
from check_golden import check_case, HERE, load_traced_model, TOLERANCE

GOLDEN = HERE / 'data' / 'golden'


@pytest.fixture(scope='module')
def model():
    return load_traced_model(GOLDEN)


@pytest.mark.parametrize('name', ['v4t4', 'v2t4', 'prev100', 'query_112x168'])
def test_ids_positions_lengths_and_logits_match_the_published_code(model, name):
    outcome = check_case(model, GOLDEN, name)
    assert outcome.mismatches == []
    assert outcome.rounds == 44
    assert outcome.deviation <= TOLERANCE


def altered(folder: Path, **changes) -> Path:
    """Copy one case with an array or a setting changed."""
    case = json.loads((GOLDEN / 'v4t4.json').read_text())
    case['rounds'] = 8
    with np.load(GOLDEN / 'v4t4.npz') as stored:
        trace = dict(stored)
    for key, value in changes.items():
        if key in case:
            case[key] = value
        else:
            trace[key] = trace[key] + value
    (folder / 'v4t4.json').write_text(json.dumps(case))
    np.savez(folder / 'v4t4.npz', **trace)
    return folder


@pytest.mark.parametrize('changes', [
    {'r007_ids': 1}, {'r007_pos': np.float32(0.5)}, {'r007_past_len': 1}, {'r007_new_pos': 1},
    {'r007_logits_sub': np.float32(1e-3)}, {'r003_k_raw': np.float32(1e-3)},
    {'r003_v': np.float32(np.nan)}, {'seed': 2}, {'text_round': 5}, {'text_sink': 3},
    {'fps': 4}], ids=str)
def test_the_check_notices_any_difference(model, tmp_path, changes):
    if 'text_sink' in changes:
        changes = {**changes, 'text_sliding_window': 4}
    assert not check_case(model, altered(tmp_path, **changes), 'v4t4').passed


def test_the_command_prints_a_line_per_case_and_exits_with_the_outcome(tmp_path):
    altered(tmp_path, r007_ids=1)
    shutil.copytree(GOLDEN / 'tiny_model', tmp_path / 'tiny_model')
    command = [sys.executable, str(HERE / 'check_golden.py')]
    bad = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert 'FAILED' in bad.stdout and 'round 7: ids' in bad.stdout
    altered(tmp_path)
    good = subprocess.run([*command, str(tmp_path), '--model', str(GOLDEN / 'tiny_model'), 'v4t4'],
                          capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    assert good.stdout.startswith('v4t4') and 'ok' in good.stdout
