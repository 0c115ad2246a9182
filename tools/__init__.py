"""Commands beside the stages: python -m tools.report, tools.predict, tools.bench."""
