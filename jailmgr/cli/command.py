"""How a command is declared: a plain function of `Settings` and its own options, made known to Typer.

The global options are declared once (`Globals`) and taken before the command, after it, and after a noun alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_type_hints

import typer

from jailmgr.cli.settings import Settings, require_door, require_root, settle

Who = Literal["root", "users", "anyone"]

FORMATS = ("table", "json", "yaml", "csv")


def _format(value: str | None) -> str | None:
    if value is not None and value not in FORMATS:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(FORMATS)}.")
    return value


def _global_options(hidden: bool) -> dict[str, Any]:
    """Annotations of the global options; hidden in the help of a command, which refers to that of `jailmgr`."""

    def option(*names: str, **more: Any) -> Any:
        return typer.Option(*names, hidden=hidden, **more)

    return {
        "tenant": Annotated[
            str | None,
            option("--tenant", metavar="TENANT", help="The tenant meant; else $JAILMGR_TENANT, else default."),
        ],
        "format": Annotated[
            str | None,
            option("--format", metavar="|".join(FORMATS), help="How results are printed.", callback=_format),
        ],
        "root": Annotated[
            str | None,
            option("--root", metavar="DIR", help="Where this instance keeps all it owns; else $JAILMGR_ROOT."),
        ],
        "quiet": Annotated[bool | None, option("--quiet", "-q", help="No progress, no remarks.")],
        "yes": Annotated[bool | None, option("--yes", "-y", help="Answer every question with yes.")],
        "debug": Annotated[bool | None, option("--debug", help="Show the traceback of an error.")],
    }


GLOBALS = tuple(_global_options(hidden=False))


def take_globals(callback: Callable[[], None]) -> Callable[..., None]:
    """A group's callback that takes the global options and keeps them for its commands."""

    def remember(context: typer.Context, **given: Any) -> None:
        _remember(context, given)

    _declare(remember, callback, [], hidden=callback.__name__ != "jailmgr")
    return remember


def command(
    app: typer.Typer, name: str | None = None, *, example: str, who: Who = "users"
) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Make a function known to Typer as the command `name`, with the global options and an example in its help.

    The function's first parameter is the command's `Settings`; it returns its exit status, None for 0. `who` may run
    it: `users` are root and those whom a tenant names.
    """

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        def run(context: typer.Context, **given: Any) -> int | None:
            chosen = _remember(context, {key: given.pop(key) for key in GLOBALS})
            settings = settle(chosen)
            if who == "root":
                require_root()
            elif who == "users":
                require_door(settings.root)
            return function(settings, **given)

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        _declare(run, function, own, hidden=True)
        epilog = f"\b\nGlobal options, taken here too: see jailmgr --help.\n\b\nExample:\n  {example}"
        app.command(name or function.__name__.rstrip("_"), epilog=epilog)(run)
        return function

    return register


def _remember(context: typer.Context, given: dict[str, Any]) -> dict[str, Any]:
    """Add global options to those given so far; the last of two wins."""
    chosen: dict[str, Any] = context.ensure_object(dict)
    chosen.update({key: value for key, value in given.items() if value is not None})
    return chosen


def _declare(run: Callable[..., Any], told: Callable[..., Any], own: list[inspect.Parameter], hidden: bool) -> None:
    """Give `run` the signature that Typer reads: the context, `told`'s own parameters, the global options."""
    options = _global_options(hidden)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(parameter.replace(kind=keyword) for parameter in own),
        *(inspect.Parameter(key, keyword, default=None, annotation=kind) for key, kind in options.items()),
    ]
    run.__name__, run.__doc__ = told.__name__, told.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    hints = get_type_hints(told, include_extras=True)
    run.__annotations__ = {
        "context": typer.Context,
        **{parameter.name: hints[parameter.name] for parameter in own},
        **options,
    }


def group(app: typer.Typer, name: str, text: str) -> typer.Typer:
    """A noun below `app`, whose commands are added to what is returned."""
    noun = new_app(text)
    app.add_typer(noun, name=name)
    return noun


def new_app(text: str) -> typer.Typer:
    """A Typer app of ours: plain help, no completion options, errors left to main."""

    def jailmgr() -> None:
        pass

    app = typer.Typer(
        help=text,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=text)(take_globals(jailmgr))
    return app


def current() -> Settings:
    """Settings of no options at all, for what runs outside of a command."""
    return settle({})
