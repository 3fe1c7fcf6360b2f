"""How a trained model is judged: the lmms-eval model and tasks, yes/no scoring, and offline data sets."""
