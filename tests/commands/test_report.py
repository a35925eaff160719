"""The page from made-up evictions: the numbers in the table, charts that show something, nothing from a network."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_kvevict.cache.plan import EvictionPlan
from vllm_kvevict.commands.report.figures import bin_shares, draw_figures
from vllm_kvevict.commands.report.page import write_page
from vllm_kvevict.commands.report.table import table_rows
from vllm_kvevict.eviction.record import Inspection, RecordedEviction

PLAN = EvictionPlan(num_tokens=70, num_kept_blocks=4, block_size=8)  # 9 blocks, the last one holds 6 tokens


def made_up_record(sign: float = 1.0) -> RecordedEviction:
    """2 layers x 2 heads; head (0, 0) keeps 5 full pages and its tail, (1, 1) one; the latest tokens stay."""
    full_pages = torch.tensor([[5, 3], [3, 1]])
    kept = torch.arange(70) >= 70 - (full_pages * 8 + 6)[..., None]
    scores = sign * torch.ones(2, 2, 70)
    scores[1, :, :30] = 0.0  # nothing of layer 1's score is there
    return RecordedEviction(
        scores, kept, full_pages + 1, PLAN, num_first=2, num_last=6, page_bytes=1024, seconds=0.0125
    )


def made_up(answer: str = "Forty-seven.") -> Inspection:
    return Inspection(made_up_record(), "some/model", "lava", "lava", 32, answer)


def colours(png: bytes) -> int:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    return len(np.unique(pixels, axis=0))


def test_the_table_holds_the_numbers() -> None:
    rows = dict(table_rows(made_up()))
    assert rows["prompt tokens"] == "70"
    assert rows["kept tokens per head, mean"] == "30.0"
    assert rows["kept tokens per head, smallest"] == "14"
    assert rows["kept tokens per head, largest"] == "46"
    assert rows["kept tokens, largest / smallest"] == "3.29"
    assert rows["pages per head, smallest to largest"] == "2 to 6"
    assert (rows["blocks before"], rows["blocks after"]) == ("9", "4")
    assert rows["bytes saved"] == "20,480 (0.0 MiB)"  # 5 blocks x 4 pages x 1024
    assert rows["eviction, milliseconds (a first run)"] == "12.5"
    assert rows["budget"] == "32 tokens"
    assert rows["answer"] == "Forty-seven."


def test_shares_count_the_tokens_that_compete_only() -> None:
    record = made_up_record()
    # of positions 2 to 63 head (0, 0) keeps 40, (0, 1) 24; layer 1 scores 34 of them, and keeps 24 and 8
    assert record.score_shares().tolist() == pytest.approx([64 / 124, 32 / 68])
    assert record.token_shares().tolist() == pytest.approx([64 / 124, 32 / 124])


def test_scores_that_are_no_masses_have_no_share() -> None:
    record = made_up_record(sign=-1.0)
    assert all(math.isnan(share) for share in record.score_shares().tolist())
    rows = dict(table_rows(Inspection(record, "m", "p", "a", 0.5, "")))
    assert rows["score kept, mean over layers"] == "not defined for these scores"
    assert rows["budget"] == "0.5 of the prompt"
    assert draw_figures(record).keys() == {"pages", "kept", "score"}


@pytest.mark.parametrize(("num_tokens", "most"), [(7, 10), (10, 10), (23, 10), (1000, 300)])
def test_binned_shares_lose_no_token(num_tokens: int, most: int) -> None:
    kept = torch.rand(5, num_tokens) < 0.3
    shares = bin_shares(kept, most)
    widths = torch.bincount(torch.arange(num_tokens) * shares.shape[1] // num_tokens)
    assert shares.shape == (5, min(num_tokens, most)) and widths.max() - widths.min() <= 1
    assert torch.allclose((shares * widths).sum(1), kept.sum(1).float(), atol=1e-3)


def test_the_page_is_one_file_with_charts_in_it(tmp_path: Path) -> None:
    written = write_page(made_up("<script>&"), tmp_path / "report.html", png=True)
    assert [path.name for path in written] == [
        "report.html",
        "report-pages.png",
        "report-kept.png",
        "report-score.png",
    ]
    html = written[0].read_text()
    assert "http://" not in html and "https://" not in html and "<script" not in html
    assert "&lt;script&gt;&amp;" in html
    images = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert images == [path.read_bytes() for path in written[1:]]
    assert html.count("src=") == 3 and "href=" not in html
    assert all(colours(image) > 5 for image in images)


def test_charts_of_a_large_model_stay_readable() -> None:
    """80 layers x 8 heads: no numbers in the cells, no figure taller than a screen or two."""
    kept = torch.rand(80, 8, 1000) < 0.1
    plan = EvictionPlan(1000, 20, 32)
    record = RecordedEviction(torch.rand(80, 8, 1000), kept, torch.randint(1, 40, (80, 8)), plan, 0, 32, 8192, 0.1)
    for png in draw_figures(record).values():
        width, height = Image.open(io.BytesIO(png)).size
        assert width == 1100 and height <= 1800
        assert colours(png) > 5
