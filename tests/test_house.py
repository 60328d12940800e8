"""The rules of the house (CONTRIBUTING.md), held over every file that git knows.

PRIVATE and UNEXPLAINED list what is not yet so. They only get shorter: what is done must go from its list.
"""

from __future__ import annotations

import ast
import graphlib
import re
from itertools import pairwise

import pytest
from omegaconf import OmegaConf

from tests.harness.sources import (
    PRODUCT,
    ROOT,
    fields,
    files,
    headings,
    imports,
    keys_of,
    private_names,
    product,
    prose,
    text_of,
)

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the files are those that git knows")

MAX_LINES = 400
MAY_IMPORT = {
    "model": "",
    "parallel": "model",
    "data": "model",
    "train": "parallel data model configs",
    "launch": "train parallel data model configs",
    "configs": "",
}

# Private names of torch and its relatives, which may change with any version, and the files that lean on them.
PRIVATE = {
    ("parallel/torch_private.py", "_fsdp_param_groups"),
    ("parallel/torch_private.py", "_get_default_store"),
    ("parallel/torch_private.py", "_get_fsdp_state"),
    ("parallel/torch_private.py", "torch.distributed.fsdp._fully_shard._fsdp_common.FSDPMeshInfo"),
    ("parallel/torch_private.py", "torch.distributed.fsdp._fully_shard._fsdp_common.HSDPMeshInfo"),
    ("parallel/torch_private.py", "torch.distributed.fsdp._fully_shard._fsdp_common.ShardPlacementResult"),
    ("parallel/torch_private.py", "torch.distributed.tensor._utils.compute_local_shape_and_global_offset"),
    ("parallel/torch_private.py", "torch.utils._python_dispatch.TorchDispatchMode"),
    ("parallel/torch_private.py", "torch.utils._pytree.tree_iter"),
}

# Config keys that have no docstring, and are in no recipe nor in README.md; by the reason.
UNEXPLAINED = {
    "named as AdamW names them": "optimizer.beta1 optimizer.beta2 optimizer.eps",
    "named as wandb names them": "trackers.wandb.project trackers.wandb.entity trackers.wandb.name "
    "trackers.wandb.group trackers.wandb.tags",
}

# Sentences that begin with one of these words are mostly fragments.
FRAGMENT = re.compile(r"(?:^|(?<=[.!?])\s+)(?:Of|Those|As|By|Over)\b")

# Paths of one machine, and hosts of package registries; as patterns, so that this file has none of them.
FOREIGN = re.compile(r"(?<![\w.])/(?:work|tmp/w)\b(?!-)|pypi\.org|registry\.npmjs\.org|deb\.debian\.org")


def none_of(problems: list[str]) -> None:
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


READS = re.compile(
    r"pickle\.(loads?|Unpickler)\b|torch\.load\(|np\.(load|memmap)\(|json\.loads?\(|OmegaConf\.load\(|\.from_file\("
    r"|\bsafe_open\(|\bload_file\(|all_gather_object\(|dcp\.load\(|csv\.reader\(|tarfile\.open\(|\.ParquetFile\(|ipc\.open_\w+\(|Image\.open\(|av\.open\(|yaml\.\w*load|marshal\.|shelve\."
)


def test_every_place_that_deserialises_is_in_the_table_of_what_is_read() -> None:
    text = text_of("docs/architecture.md")
    table = text[text.index("**What is read, and what may be in it.**") : text.index(" run.dir/")]
    listed = set(re.findall(r"\]\(\.\./([\w/]+\.py)\)", table)) - {"tests/test_house.py"}
    found = {source.name for source in product() if READS.search(text_of(source.name))}
    none_of([f"{name}: deserialises, and is not in the table of docs/architecture.md" for name in found - listed])
    none_of([f"{name}: is in the table of docs/architecture.md, and deserialises nothing" for name in listed - found])


def test_folders_import_in_one_direction() -> None:
    problems = []
    for source in product():
        legal = MAY_IMPORT[source.folder]
        for found in imports(source.tree):
            if found.module.partition(".")[0] in {"", "tests", *PRODUCT} - {source.folder, *legal.split()}:
                problems.append(f"{source.name}:{found.line}: imports {found.path}; legal: {legal or 'none'}")
    none_of(problems)


def test_modules_import_without_a_cycle() -> None:
    modules = {re.sub(r"(/__init__)?\.py$", "", source.name).replace("/", "."): source for source in product()}
    lines = {
        (module, found.path if found.path in modules else found.module): found.line
        for module, source in modules.items()
        for found in imports(source.tree)
        if found.at_start
    }
    graph: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for module, imported in lines:
        graph.add(module, *({imported} & modules.keys()))
    try:
        graph.prepare()
    except graphlib.CycleError as error:
        steps = pairwise(error.args[1][::-1])  # each imports the next
        none_of([f"{modules[a].name}:{lines[a, b]}: {a} imports {b}, which imports it in turn" for a, b in steps])


def test_no_file_is_long() -> None:
    counts = {name: len(text_of(name).splitlines()) for name in files() if name.endswith(".py")}
    none_of([f"{name}:{count}: the last of {count} lines" for name, count in counts.items() if count > MAX_LINES])


def test_the_model_knows_one_device() -> None:
    problems = []
    for source in (source for source in product() if source.folder == "model"):
        lines = {found.line for found in imports(source.tree) if f"{found.path}.".startswith("torch.distributed.")}
        for node in ast.walk(source.tree):
            match node:
                case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                    lines.add(node.lineno)
        problems += [f"{source.name}:{line}: torch.distributed is for parallel/" for line in sorted(lines)]
    none_of(problems)


def test_private_names_of_torch_are_the_listed_ones() -> None:
    found = {(source.name, name): line for source in product() for line, name in private_names(source)}
    new, gone = sorted(found.keys() - PRIVATE), sorted(PRIVATE - found.keys())
    none_of(
        [f"{file}:{found[file, name]}: {name} is private, and not in PRIVATE" for file, name in new]
        + [f"{file}: {name} is no more there; take it out of PRIVATE" for file, name in gone]
    )


def test_every_config_key_is_explained() -> None:
    # here, so that a product that cannot be imported does not hide what the other guards say
    from train.config import Config
    from train.load_config import get
    from train.overrides import leaves

    schemas = [source for source in product() if source.name in ("train/config.py", "parallel/options.py")]
    readme, config = text_of("README.md"), Config()
    explained = {name: found for schema in schemas for name, found in fields(schema.tree).items()}
    assert "any field of `model/config.py`" in readme, "README.md: says no more where the model's sizes are"
    named = set(re.findall(r"\w+(?:\.\w+)+", readme))
    for recipe in (name for name in files() if re.fullmatch(r"configs/.*\.yaml", name)):
        named |= set(keys_of(OmegaConf.to_container(OmegaConf.load(ROOT / recipe))))
    found = {}
    for key, _ in leaves(Config):
        section, _, name = key.rpartition(".")
        line, has_docstring = explained.get(f"{type(get(config, section)).__name__}.{name}", (1, False))
        is_size = section == "model" and name not in ("name", "weights", "vision", "audio")
        if not (has_docstring or is_size or key in named):
            found[key] = line
    listed = {key for keys in UNEXPLAINED.values() for key in keys.split()}
    none_of(
        [f"{key} needs a docstring (line {found[key]})" for key in sorted(found.keys() - listed)]
        + [f"take {key} out of UNEXPLAINED" for key in sorted(listed - found.keys())]
    )


def test_links_lead_to_files_and_headings() -> None:
    known = {path for name in files() for path in (ROOT / name, *(ROOT / name).parents)}
    problems = []
    for document in (name for name in files() if re.fullmatch(r"(README|CONTRIBUTING|CHANGELOG|docs/.*)\.md", name)):
        for number, line in enumerate(text_of(document).splitlines(), 1):
            for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)[^)]*\)", line):
                path, _, anchor = link.partition("#")
                target = ((ROOT / document).parent / path if path else ROOT / document).resolve()
                if target not in known or (anchor and anchor not in headings(target.read_text())):
                    problems.append(f"{document}:{number}: {link} leads to nothing in the repository")
    none_of(problems)


def test_named_tests_exist() -> None:
    """A test that is named in a document or in a list of what is run is where its name says."""
    problems = []
    for name in files():
        for number, line in enumerate(text_of(name).splitlines(), 1):
            for path, test in re.findall(r"(?<![\w./])(tests/[\w/]+\.py)(?:::(\w+))?", line):
                if path not in files() or (test and f"def {test}(" not in text_of(path)):
                    problems.append(f"{name}:{number}: no {test or 'tests'} in {path}")
    none_of(problems)


def test_sentences_are_whole() -> None:
    none_of(
        [
            f"{source.name}:{line}: a sentence of this text begins with '{found[0].strip()}'"
            for source in product()
            for line, text in prose(source)
            if (found := FRAGMENT.search(text))
        ]
    )


def test_no_file_speaks_of_one_machine() -> None:
    none_of(
        [
            f"{name}:{number}: {found[0]}"
            for name in files()
            for number, line in enumerate(text_of(name).splitlines(), 1)
            if (found := FOREIGN.search(line))
        ]
    )
