"""A Croissant 1.0 description (JSON-LD) of the clean shards of a scan: https://docs.mlcommons.org/croissant/docs/croissant-spec.html

WebDataset has no word of its own in Croissant, so samples are told as the images inside the tars, each with its key.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sanitize.artifacts.scan_folder import WrittenFile
from sanitize.stages.shards import IMAGE_EXTENSIONS

Node = dict[str, Any]
VERSIONS = ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"]
_CR = "citeAs column equivalentProperty extract field fileProperty fileObject fileSet format includes isLiveDataset jsonPath key"
_CR += (
    " md5 parentField path recordSet references regex repeated replace samplingRate separator source subField transform"
)
CONTEXT: Node = {  # the specification's
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{name: f"cr:{name}" for name in _CR.split()},
}
KEY = r"^(?:.*/)?([^./]+)\.[^/]*$"  # of a member's name: its base name up to the first dot


def croissant(
    name: str,
    description: str,
    tars: Mapping[str, WrittenFile],
    image_member: str,
    cleaning: Sequence[str],
    limits: Sequence[str],
) -> str:
    """tars: by name below the scan folder, which is where the description lies when its addresses are followed. cleaning: what was done;
    limits: what that does not show."""
    parts = [_file_object(path, file) for path, file in sorted(tars.items())]
    dataset: Node = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": name,
        "description": description,
        "conformsTo": VERSIONS,
        "distribution": [*parts, _images(sorted(tars), image_member)] if parts else [],
        "recordSet": [SAMPLES] if parts else [],
        "rai:dataPreprocessingProtocol": list(cleaning),
        "rai:dataLimitations": list(limits),
    }
    return json.dumps(dataset, indent=2, ensure_ascii=False) + "\n"


def _file_object(path: str, file: WrittenFile) -> Node:
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path,
        "contentUrl": path,
        "contentSize": f"{file.bytes} B",
        "encodingFormat": "application/x-tar",
        "sha256": file.sha256,
    }


def _images(tars: Sequence[str], image_member: str) -> Node:
    """The members that were scored, in every tar."""
    endings = [image_member] if image_member else IMAGE_EXTENSIONS
    return {
        "@type": "cr:FileSet",
        "@id": "images",
        "name": "images",
        "description": "The images in the tars, which are WebDataset shards. Other members of a sample share its key.",
        "containedIn": [{"@id": path} for path in tars],
        "encodingFormat": ["image/jpeg", "image/png"],
        "includes": [f"*.{ending}" for ending in endings],
    }


def _field(name: str, description: str, kind: str, extract: str, **more: Any) -> Node:
    source = {"fileSet": {"@id": "images"}, "extract": {"fileProperty": extract}, **more}
    return {
        "@type": "cr:Field",
        "@id": f"samples/{name}",
        "name": name,
        "description": description,
        "dataType": kind,
        "source": source,
    }


SAMPLES: Node = {
    "@type": "cr:RecordSet",
    "@id": "samples",
    "name": "samples",
    "description": "Kept samples.",
    "field": [
        _field(
            "key",
            "WebDataset key without its folder; unique in one shard.",
            "sc:Text",
            "filename",
            transform={"regex": KEY},
        ),
        _field("image", "The image member, as it was in the source.", "sc:ImageObject", "content"),
    ],
}
