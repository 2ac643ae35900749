"""What a command prints that is refused: one line."""


def check_refused(result, *words: str):
    status, out, err = result
    assert status == 2, (status, out, err)
    assert err.startswith("fastkd: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err + out
    for word in words:
        assert word in err, err
