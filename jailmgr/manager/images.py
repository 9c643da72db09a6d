"""Images: found by what a user calls them, built once for all who want them at the same time, listed, deleted."""

from __future__ import annotations

import os
import re
import secrets
import time
from contextlib import ExitStack
from typing import Any

import msgspec

from jailmgr.errors import JailmgrError
from jailmgr.image import store as image_store
from jailmgr.key_checks import near_miss
from jailmgr.manager.builder import claim_idmap, remove_build, run_in_build
from jailmgr.manager.builds import Building
from jailmgr.manager.context import ADOPT
from jailmgr.manager.host import Manager
from jailmgr.manager.strangers import image_of_stranger
from jailmgr.manager.view import image_info, image_view
from jailmgr.model import Image, ImageInfo, ImageView
from jailmgr.progress import Cancelled, CancelledError, Progress, never, quiet
from jailmgr.storage.pool import pool_usage
from jailmgr.storage.volume import create_build
from jailmgr.template.build import Built, build_image, describe, plan_build
from jailmgr.template.recipe import Build, find_templates, load_template, resolve

_PREFIX = re.compile(r"[0-9a-f]{4,64}\Z")


def find_source(m: Manager, source: str) -> Image | Build:
    """What a user calls SOURCE: an image already built of a template as it is now, what is to be built, or an image by
    alias or fingerprint prefix. JailmgrError `missing`, `invalid`.
    """
    templates = find_templates(m.root)
    name = source.partition("/")[0]
    if name in templates:
        build = resolve(m.root, source)
        return m.store.image_of_key(build.key) or build
    image = _image_by_name(m, source)
    if image is not None:
        return image
    known = [*templates, *(alias for image in m.store.images() for alias in image.aliases)]
    hint = near_miss(source, known) or near_miss(name, known) or f"There are: {', '.join(sorted(set(known)))}."
    raise JailmgrError(f"source {source}", "there is no template and no image of that name", hint, "missing")


def ensure_image(
    m: Manager, source: str, progress: Progress = quiet, cancelled: Cancelled = never, refresh: bool = False
) -> Image:
    """The image of a source, built if it isn't there. `refresh`: a template is built even if its image is there.

    Of several callers at once one builds, the others wait and see
    its progress. Raises JailmgrError as the build does, CancelledError; nothing is left of a build that failed.
    """
    found = resolve(m.root, source) if refresh else find_source(m, source)
    if isinstance(found, Image):
        return found
    with m.image_lock:
        image = None if refresh else m.store.image_of_key(found.key)
        if image is not None:
            return image
        building, leads = m.builds.join(found.key, cancelled)
    if not leads:
        return building.wait(source, progress, cancelled)

    def tell(step: str, done: int, total: int) -> None:
        building.report(step, done, total)
        progress(step, done, total)

    try:
        image = _build(m, found, tell, building.cancelled)
    except JailmgrError as error:
        _end(m, found, building, None, error)
        if cancelled() and not isinstance(error, CancelledError):
            raise CancelledError(f"image of {source}") from error
        raise
    except BaseException as error:
        _end(m, found, building, None, JailmgrError(f"image of {source}", f"the build failed: {error}"))
        raise
    _end(m, found, building, image, None)
    if cancelled():
        raise CancelledError(f"image of {source}")
    return image


def _end(m: Manager, build: Build, building: Building, image: Image | None, error: JailmgrError | None) -> None:
    with m.image_lock:
        m.builds.end(build.key, building, image, error)


def _build(m: Manager, build: Build, progress: Progress, unwanted: Cancelled) -> Image:
    """A build that nobody waits for any more is given up, and one that the host's disk has no room for."""
    try:
        return _carry_out(m, build, progress, lambda: unwanted() or m.disk_is_full())
    except JailmgrError as error:
        if not unwanted():
            try:
                m.check_disk()
            except JailmgrError as full:
                raise full from error
        raise


def _carry_out(m: Manager, build: Build, progress: Progress, cancelled: Cancelled) -> Image:
    name = secrets.token_hex(6)
    with ExitStack() as undo:
        undo.callback(remove_build, m, name)
        # A build that runs wild leaves the jails a tenth of what was free.
        target = create_build(m.pool, name, pool_usage(m.pool)[1] * 9 // 10)
        run = run_in_build(m, name, target, claim_idmap(m, name), cancelled)
        os.makedirs(logs := f"{m.root.lib}/logs", mode=0o700, exist_ok=True)
        log = f"{logs}/build-{build.source.replace('/', '-')}.log"
        built = build_image(m.root, build, target, run, m.root.cache, log, progress, cancelled)
        if cancelled():
            raise CancelledError(f"image of {build.source}")
        progress("Sealing the image", 0, 0)
        sealed = image_store.seal(m.pool, name, _draft(m, build, built))
        with m.image_lock:
            m.store.put_image(sealed)
        m.make_ahead(sealed.fingerprint)
        return sealed


def _draft(m: Manager, build: Build, built: Built) -> Image:
    """The image without what only its sealing tells."""
    aliases = [build.source]
    aliases += [name for name in (build.template,) if resolve(m.root, name).key == build.key]
    return Image(
        fingerprint="",
        template=build.source,
        aliases=aliases,
        size_bytes=0,
        created_at=time.time(),
        architecture=built.architecture,
        recipe=built.recipe,
        files=built.files,
        packages=built.packages,
        key=build.key,
    )


def _image_by_name(m: Manager, name: str) -> Image | None:
    image = m.store.image_of_alias(name)
    if image is not None or not _PREFIX.match(name):
        return image
    found = m.store.images_of_prefix(name)
    if len(found) > 1:
        told = ", ".join(image.fingerprint[:12] for image in found[:4])
        raise JailmgrError(
            f"image {name}", f"{len(found)} fingerprints begin so: {told}", "Give more digits.", "invalid"
        )
    return found[0] if found else None


def find_image(m: Manager, reference: str) -> Image:
    """An image by alias, template or fingerprint prefix (4 hexadecimal digits or more). JailmgrError `missing`."""
    image = _image_by_name(m, reference)
    if image is None and reference.partition("/")[0] in find_templates(m.root):
        image = m.store.image_of_key(resolve(m.root, reference).key)
    if image is None:
        known = [alias for image in m.store.images() for alias in image.aliases]
        hint = near_miss(reference, known) or "See jailmgr image list."
        raise JailmgrError(f"image {reference}", _not_found(m, reference), hint, "missing")
    return image


def _not_found(m: Manager, reference: str) -> str:
    """Say why a reference is no image; a prefix of a fingerprint that is too short names its matches."""
    if not re.fullmatch("[0-9a-f]{1,3}", reference):
        return "not found: no alias is so called, and no fingerprint begins so"
    found = [image.fingerprint[:12] for image in m.store.images() if image.fingerprint.startswith(reference)]
    count = f"{len(found)} match: {', '.join(found[:4])}" if found else "none matches"
    return f"a prefix of a fingerprint has 4 digits or more ({count})"


def list_images(m: Manager, tenants: list[str] | None = None) -> list[ImageView]:
    """Images, the oldest first. Of jails those of `tenants` are counted; None for all."""
    counts = m.store.count_jails_of_images(tenants)
    return [image_view(image, counts.get(image.fingerprint, 0)) for image in m.store.images()]


def get_image(m: Manager, reference: str, tenants: list[str] | None = None) -> ImageInfo:
    """One image with its manifest, counts as above. JailmgrError `missing`."""
    image = find_image(m, reference)
    return image_info(image, m.store.count_jails_of_images(tenants).get(image.fingerprint, 0))


def delete_image(m: Manager, reference: str) -> None:
    """JailmgrError `missing`, or `conflict` where jails are made of it.

    First the image, then its row: a row without an image is what the next start takes away.
    """
    image = find_image(m, reference)
    with m.image_lock:
        m.store.check_image_unused(image.fingerprint)
        if stranger := image_of_stranger(m, image.fingerprint):
            why = f"jail {stranger}, which the store does not know, is made of it"
            raise JailmgrError(f"image {image.fingerprint[:12]}", why, ADOPT, "conflict")
        image_store.remove_image(m.pool, image.fingerprint)
        m.store.remove_image(image.fingerprint)


def plan_image(m: Manager, source: str) -> dict[str, Any]:
    """Return what a build of a template does, and the image that is there. JailmgrError `missing`, `invalid`."""
    build = resolve(m.root, source)
    image = m.store.image_of_key(build.key)
    return {
        "source": build.source,
        "packages": build.packages,
        "steps": [describe(step) for step in plan_build(build)],
        "image": image and {"fingerprint": image.fingerprint, "created_at": image.created_at},
    }


def list_templates(m: Manager) -> list[dict[str, Any]]:
    """Templates by name, with what can be chosen of each; one that can't be read says so in `error`."""
    found = []
    for name, folder in sorted(find_templates(m.root).items()):
        try:
            found.append(_template(name, folder))
        except JailmgrError as error:
            found.append({"name": name, "folder": folder, "error": str(error)})
    return found


def show_template(m: Manager, source: str) -> dict[str, Any]:
    """Return one template; with a release or variant named, also what that one resolves to in `build`.

    Raises JailmgrError `missing`, `invalid`.
    """
    name = source.partition("/")[0]
    templates = find_templates(m.root)
    if name not in templates:
        hint = near_miss(name, templates) or f"There are: {', '.join(sorted(templates))}."
        raise JailmgrError(f"template {name}", "there is none of that name", hint, "missing")
    shown = _template(name, templates[name])
    if source == name:
        return shown
    build = resolve(m.root, source)
    built = {"release": build.release, "variant": build.variant, "packages": build.packages, "init": build.recipe.init}
    return shown | {"build": built}


def _template(name: str, folder: str) -> dict[str, Any]:
    told = msgspec.to_builtins(load_template(folder))
    return {"name": name, "folder": folder} | (told if isinstance(told, dict) else {})
