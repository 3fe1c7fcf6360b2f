"""Writes tiny tar shards."""

import io
import json
import tarfile

from ..tiny import tiny_image


def jpeg(seed=0):
    buffer = io.BytesIO()
    tiny_image(seed, (8, 6)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def web_document(key, texts, images):
    """The files of an MMC4 document; `images` are (name, text index, similarity, bytes)."""
    info = [{"image_name": n, "matched_text_index": i, "matched_sim": s} for n, i, s, _ in images]
    files = {f"{key}.json": json.dumps({"text_list": texts, "image_info": info})}
    return files | {f"{key}.{name}": data for name, _, _, data in images if data is not None}
