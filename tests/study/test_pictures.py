"""The pictures that the evidence page opens with show rows that are recorded, where the table has them."""

import pytest
from carerl_kernels.study import pictures
from carerl_kernels.study.cells import current, read_records
from carerl_kernels.study.grid import Grid
from carerl_kernels.study.pictures import HEADLINES, draw_headline
from carerl_kernels.study.tables import rows_of
from places import DOCS

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def records():
    return current(Grid.load("full"), read_records(DOCS / "evidence" / "cells.jsonl"))[0]


@pytest.mark.parametrize("headline", HEADLINES, ids=lambda headline: headline.name)
def test_every_row_of_a_headline_is_drawn_where_the_table_has_it(headline, records, tmp_path, monkeypatch):
    drawn = {}

    def save(figure, axes, path, *names):
        for (x, y), name in zip(
            [(bars[0].get_xdata()[0], bars[0].get_ydata()[0]) for bars in axes.containers],
            [bars.get_label() for bars in axes.containers],
            strict=True,
        ):
            drawn[name] = x, y

    monkeypatch.setattr(pictures, "_save", save)
    assert draw_headline(headline, records, tmp_path)
    rows = {row.variant: row for row in rows_of(records, headline.setting)}
    assert drawn.keys() == set(headline.shown.values())
    for variant, name in headline.shown.items():
        signs = [-1 if measure.startswith("-") else 1 for measure, _ in (headline.x, headline.y)]
        wanted = [rows[variant].of(measure.removeprefix("-")).mean for measure, _ in (headline.x, headline.y)]
        assert drawn[name] == pytest.approx([sign * value for sign, value in zip(signs, wanted, strict=True)])


def test_without_records_of_its_setting_a_headline_is_not_drawn(tmp_path):
    assert not draw_headline(HEADLINES[0], [], tmp_path)
    assert not list(tmp_path.iterdir())
