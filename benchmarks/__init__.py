"""What times the parts of this project; outside the wheel. Run from the checkout: `python -m benchmarks.NAME`."""
