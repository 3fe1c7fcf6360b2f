"""Published methods with the defects of their code, to be compared with the published figures (docs/methods.md)."""
