"""The graphs of an engine from those of a bundle: the same plan always gives the same ones."""

import hashlib
from pathlib import Path

import onnx_ir as ir

from restyle_deploy import __version__
from restyle_deploy.bundle import Bundle, EngineRecord, how_to_build_again
from restyle_deploy.errors import BundleError
from restyle_deploy.files import sha256_of_file
from restyle_deploy.graph.edit import fix_batch
from restyle_deploy.graph.plan import AS_EXPORTED, Choices, apply_choices, find_sites
from restyle_deploy.graph.preview import preview_graph
from restyle_deploy.model_config import ModelConfig


def graphs_by_role(
    name: str, model: ir.Model, config: ModelConfig, *, choices: Choices, epilogues: bool
) -> dict[str, ir.Model]:
    """Rewrite an exported graph by a plan, and make the graphs that come with it: `target`, `preview`.

    Args:
        name: `encoder` or `generator`.
        model: the exported graph; changed in place.
        config: its sizes.
        choices: by `Site.name`; a graph all of whose sites stay as exported is not changed at all.
        epilogues: see `apply_choices` and `needs_epilogues`.
    """
    models = {name: model}
    if name == "generator" and config.output_size > config.input_size:
        models["preview"] = preview_graph(model, config)
    graphs: dict[str, ir.Model] = {}
    for role, part in models.items():
        sites = [site for site in find_sites(part) if choices[site.name] != AS_EXPORTED]
        if sites:
            target = apply_choices(part, sites, choices, epilogues=epilogues)
            if target is not None:
                graphs["target"] = target
        graphs[role] = part
    return graphs


def needs_epilogues(precision: str, *, has_kernels: bool) -> bool:
    """Whether what follows a convolution becomes one node: for our kernels, or for float16's range."""
    return has_kernels or precision == "fp16"


def save_graph(model: ir.Model, role: str, folder: Path, *, batch: int | None) -> Path:
    """Write a graph as `<role>.onnx` with its weights beside it, its batch fixed or free; return the file.

    The same graph always gives the same bytes: onnx_ir leaves the weights of an extracted graph in any order.
    """
    fix_batch(model, batch)
    initializers = model.graph.initializers
    for name in sorted(initializers):
        initializers[name] = initializers.pop(name)
    path = folder / f"{role}.onnx"
    ir.save(model, path, external_data=f"{role}.data")
    return path


def digest_of_graph(path: Path) -> str:
    """Return a hash of what `save_graph` wrote and of this release, which decides what a backend makes of it."""
    files = (path, path.with_suffix(".data"))
    hashes = [sha256_of_file(file) for file in files if file.is_file()]
    return hashlib.sha256(" ".join([__version__, *hashes]).encode()).hexdigest()


def write_weights(bundle: Bundle, engine: EngineRecord, *, folder: Path) -> dict[str, Path]:
    """Write the graphs again that a stripped engine was built from; they have its weights.

    Args:
        bundle: its graphs are unchanged since the engine was built.
        engine: a stripped one; states the digest of each graph in `build["graphs"]`.
        folder: takes the files.
    Returns:
        A file by role.
    Raises:
        BundleError: they differ from those that the engine was built from, as another release of this package or of its
            libraries wrote them.
    """
    files = {}
    epilogues = needs_epilogues(engine.precision, has_kernels=engine.build["plugin_hash"] is not None)
    for name, record in bundle.graphs.items():
        model, choices = ir.load(record.path), engine.plan["choices"]
        models = graphs_by_role(name, model, bundle.config, choices=choices, epilogues=epilogues)
        for role, part in models.items():
            files[role] = save_graph(part, role, folder, batch=engine.batch)
            if digest_of_graph(files[role]) != engine.build["graphs"][role]["digest"]:
                raise BundleError(
                    f"{engine.directory}: its weights cannot be made again, as the {role} has changed; "
                    f"{how_to_build_again(bundle, engine)}"
                )
    return files
