"""What `fastkd bench data` says: the table, which loader to take with how many workers, and what limits the run."""

from fastkd.bench import Record, load_notes, log_rank0, show_table

ENOUGH = 0.95  # of the fastest: fewer workers that reach it are taken
SPARE = 1.1  # a loader that gives this many times what the step takes does not limit the run


def show_data(record: Record) -> None:
    """Print the table, the reasons, the step's rates and the advice."""
    rows = [
        [each["name"], count, *(f"{figures['img_per_s'][key]:,.0f}" for key in ("median", "p20", "p80")),
         f"{figures['cpu_ms']['median']:.2f}", "-" if each["difference"] is None else f"{each['difference']:.2f}"]
        for each in record["loaders"].values() if each["status"] == "right"
        for count, figures in each["workers"].items()
    ]  # fmt: skip
    log_rank0(f"{record['images']:,} training images, batches of {record['batch_size']}, {record['image_size']} pixels")
    columns = ["loader", "workers", "img/s median", "p20", "p80", "CPU ms/image", "difference /255"]
    show_table(columns, rows, numbers=6, whole=1)
    for name, each in record["loaders"].items():
        if text := each.get("reason") or each.get("note"):
            log_rank0(f"{each.get('name', name)}: {each['status']}: {text}" if "reason" in each else f"{name}: {text}")
    for line in (*advice(record), *load_notes(record)):
        log_rank0(line)


def choose(record: Record, wanted: float) -> tuple[str, int, Record]:
    """(loader, workers, its figures): the fewest workers that give `wanted` images/s, or nearly the fastest."""
    each = [
        (name, int(count), figures)
        for name, loader in record["loaders"].items()
        if loader["status"] == "right"
        for count, figures in loader["workers"].items()
    ]
    fastest = max(figures["img_per_s"]["median"] for _, _, figures in each)
    least = min(wanted, ENOUGH * fastest)
    able = [choice for choice in each if choice[2]["img_per_s"]["median"] >= least]
    return min(able, key=lambda choice: (choice[1], choice[2]["cpu_ms"]["median"]))


def advice(record: Record) -> list[str]:
    """Plain words: what to use, and for each kind of step what limits the run, by what factor."""
    rates, is_cuda = record["step"]["img_per_s"], record["device"] != "cpu"
    wanted = SPARE * max(rates.values()) if rates and is_cuda else float("inf")
    name, workers, figures = choose(record, wanted)
    loader, cpu = figures["img_per_s"]["median"], figures["cpu_ms"]["median"]
    lines = [
        f"Use --loader {name} --workers {workers}: {loader:,.0f} img/s, {cpu:.2f} ms of CPU time an image"
        + (" (the fewest workers that feed the step)" if loader >= wanted else "")
    ]
    if "reason" in record["step"]:
        lines.append(f"The step of {record['step']['pair']} was not measured: {record['step']['reason']}")
    for kind, step in rates.items():
        lines.append(f"{record['step']['pair']}, {kind}: {limit(loader, step, cpu, is_cuda)}")
    return lines


def limit(loader: float, step: float, cpu_ms: float, is_cuda: bool) -> str:
    """What limits a run of these two rates (images/s). On the CPU both share the cores, so that their times add."""
    if not is_cuda:
        both, part = 1 / (1 / loader + 1 / step), step / (loader + step)
        return (
            f"the step takes {step:,.0f} img/s alone. Both share the cores: about {both:,.0f} img/s, of which the "
            f"loader has {100 * part:.0f} % of the time"
        )
    if loader >= step:
        return f"the step limits the run, at {step:,.0f} img/s; the loader could feed {loader / step:.1f} times as much"
    return (
        f"the loader limits the run: the step takes {step:,.0f} img/s, {step / loader:.1f} times what it gives. "
        f"Decoding at that rate needs about {step * cpu_ms / 1e3:.1f} cores like these; fewer pixels (--image-size, "
        "--train-size) or images decoded beforehand (fastkd pack) need less"
    )
