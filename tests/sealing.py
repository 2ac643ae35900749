"""An archive with the checksum that fastkd's checkpoints have."""

import io

from fastkd.files import Sealer


def sealed(archive: bytes) -> bytes:
    """A zip archive without a comment as `Sealer` writes it."""
    buffer = io.BytesIO()
    sealer = Sealer(buffer)
    sealer.write(archive)
    sealer.finish()
    return buffer.getvalue()
