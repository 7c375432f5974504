"""The programs of the documents."""
import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["python.md", "transformers.md", "vllm.md"])
def test_the_program_of_the_page_runs(page):
    programs = re.findall(r"^```python\n(.*?)^```", (PAGES / page).read_text(), re.M | re.S)
    assert programs
    for program in programs:
        exec(compile(program, page, "exec"), {})
