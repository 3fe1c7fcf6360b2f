"""How a trained model is evaluated: the lmms-eval model and tasks, yes/no scoring, and offline data sets."""
