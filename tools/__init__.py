"""Commands beside the stages: python -m tools.report, tools.predict, tools.label_errors, tools.bench."""
