"""Experiments outside the wheel; run from the checkout."""
