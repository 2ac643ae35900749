"""What is printed; plainly where rich, which fastkd's own report needs, is not installed."""

try:
    from fastkd.report import log_rank0, show_table
except ImportError:

    def log_rank0(message: str) -> None:
        print(message, flush=True)

    def show_table(columns: list[str], rows: list[list[str]], numbers: int = 0) -> None:
        widths = [max(len(str(row[place])) for row in [columns, *rows]) for place in range(len(columns))]
        for row in [columns, *rows]:
            cells = (str(cell).rjust if place >= len(columns) - numbers else str(cell).ljust
                     for place, cell in enumerate(row))  # fmt: skip
            log_rank0("  ".join(align(width) for align, width in zip(cells, widths, strict=True)))


__all__ = ["log_rank0", "show_table"]
