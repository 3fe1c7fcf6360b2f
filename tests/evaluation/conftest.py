"""What the tests of the lmms-eval model ask."""

import pytest

from ..tiny import tiny_image


@pytest.fixture
def docs():
    """Documents with one, two and no pictures, and questions of other lengths."""
    return [
        {
            "images": [tiny_image(10 * index + k, (40, 32)) for k in range(count)],
            "question": "What is it? " * (index + 1),
        }
        for index, count in enumerate([1, 2, 0, 1, 1])
    ]
