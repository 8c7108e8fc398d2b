"""Metafiles list every config, and the ecosystem's own checker accepts them."""

from __future__ import annotations

import modelindex
from conftest import ROOT


def test_model_index_is_valid_and_complete():
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert not index.check()
    listed = [model.config for model in index.models]
    there = {
        str(path.relative_to(ROOT))
        for path in (ROOT / 'configs').glob('*/*.py')
        if path.parent.name != '_base_'
    }
    assert sorted(listed) == sorted(there)
    # Paths are relative to the index, whose folder has no docs/ in the wheel.
    assert not any(collection.data.get('README') for collection in index.collections)
    for model in index.models:
        assert model.config.endswith(f'/{model.name}.py')


def test_every_figure_says_whose_it_is():
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    metrics = [
        name for model in index.models for result in model.results or [] for name in result.metrics
    ]
    assert len(metrics) == 7 * 6 + 3 * 2 + 6
    assert all(name.endswith(' (paper)') for name in metrics)
