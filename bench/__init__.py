"""What is measured and how; installed as fastkd.bench. `fastkd bench loss` and `pytest bench/` run it."""
