"""Training by recipe: arguments, models, the run, and the reports that keep it honest."""
