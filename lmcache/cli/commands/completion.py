"""`lmcache completion`: a script that teaches a shell the commands and options, made from the parsers."""

from __future__ import annotations

from argparse import Action, Namespace

from lmcache.cli.base import RawHelpFormatter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from lmcache.cli.base import CommandParser

INSTALL = """\
bash: mkdir -p ~/.local/share/bash-completion/completions
      lmcache completion bash > ~/.local/share/bash-completion/completions/lmcache
zsh:  lmcache completion zsh > "${fpath[1]}/_lmcache"
fish: mkdir -p ~/.config/fish/completions
      lmcache completion fish > ~/.config/fish/completions/lmcache.fish"""
FILE_METAVARS = ("FILE", "DIR")


def register_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "completion",
        help="print a completion script for a shell",
        description=f"Print a completion script. To install it:\n\n{INSTALL}",
        formatter_class=RawHelpFormatter,
        populate=add_shell,
    )
    parser.set_defaults(func=print_completion)


def add_shell(parser: CommandParser) -> None:
    """Add the only argument."""
    parser.add_argument("shell", choices=sorted(SCRIPTS))


def print_completion(args: Namespace) -> int:
    """Print the script."""
    from lmcache.cli.main import add_commands, build_parser
    from lmcache.cli.output import Result, to_json, write

    parser = build_parser()
    add_commands(parser)
    script = SCRIPTS[args.shell](list(walk(parser)))
    result = Result("Completion")
    result.put("shell", args.shell)
    result.put("script", script)
    write(to_json(result.document()) if args.format == "json" else script.rstrip("\n"), args.output)
    return 0


class Node:
    """One parser: the words that lead to it, the words that may follow, and its options."""

    def __init__(self, parser: CommandParser, path: Sequence[str]) -> None:
        self.path = " ".join(path)
        self.options = [action for action in parser._actions if action.option_strings]
        positionals = [action for action in parser._actions if not action.option_strings]
        self.children = [word for action in positionals for word in action.choices or ()]

    def words(self) -> list[str]:
        """Return everything that can be typed here."""
        return self.children + [text for option in self.options for text in option.option_strings]


def walk(parser: CommandParser, path: Sequence[str] = ()) -> Iterator[Node]:
    """Return the parser's node and those of all parsers below it."""
    if parser.is_static:
        parser.populate()
    yield Node(parser, path)
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for name, child in action.choices.items():
                yield from walk(child, [*path, name])


def values(nodes: Sequence[Node]) -> tuple[list[str], dict[str, str]]:
    """Return the options that take a file, and the values of those that have a choice of them."""
    files: set[str] = set()
    choices: dict[str, str] = {}
    for option in (option for node in nodes for option in node.options):
        for text in option.option_strings:
            if option.choices:
                choices[text] = " ".join(str(choice) for choice in option.choices)
            elif takes_file(option):
                files.add(text)
    return sorted(files), dict(sorted(choices.items()))


def takes_file(option: Action) -> bool:
    """Tell whether the option's value names a file or folder."""
    return option.metavar in FILE_METAVARS


def bash(nodes: Sequence[Node]) -> str:
    """Return the script for bash."""
    return f"""\
# bash completion for lmcache; made by 'lmcache completion bash'
_lmcache() {{
    local word path="" cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}"
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "${{path:+$path }}$word" in
            {_paths(nodes)}) path="${{path:+$path }}$word" ;;
        esac
    done
    case "$prev" in
{_cases(nodes, 'COMPREPLY=($(compgen -f -- "$cur")); return', 'COMPREPLY=($(compgen -W "{}" -- "$cur")); return')}
    esac
    case "$path" in
{_words(nodes, 'COMPREPLY=($(compgen -W "{}" -- "$cur"))')}
    esac
}}
complete -o filenames -F _lmcache lmcache
"""


def zsh(nodes: Sequence[Node]) -> str:
    """Return the script for zsh; it works from `$fpath` and from `eval`."""
    return f"""\
#compdef lmcache
# zsh completion for lmcache; made by 'lmcache completion zsh'
_lmcache() {{
    local word node=""
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case "${{node:+$node }}$word" in
            {_paths(nodes)}) node="${{node:+$node }}$word" ;;
        esac
    done
    case "${{words[CURRENT-1]}}" in
{_cases(nodes, "_files; return", "compadd -- {}; return")}
    esac
    case "$node" in
{_words(nodes, "compadd -- {}")}
    esac
}}
if [ "${{funcstack[1]}}" = _lmcache ]; then
    _lmcache "$@"
else
    compdef _lmcache lmcache
fi
"""


def fish(nodes: Sequence[Node]) -> str:
    """Return the script for fish."""
    lines = [
        "# fish completion for lmcache; made by 'lmcache completion fish'",
        "function __lmcache_at",
        '    set -l node ""',
        "    for word in (commandline -opc)[2..-1]",
        '        switch (string trim "$node $word")',
        f"            case {' '.join(_quoted(node.path) for node in nodes if node.path)}",
        '                set node (string trim "$node $word")',
        "        end",
        "    end",
        '    test "$node" = "$argv"',
        "end",
        "complete -c lmcache -f",
    ]
    for node in nodes:
        here = f"complete -c lmcache -n '__lmcache_at {node.path}'"
        lines += [f"{here} -a {_quoted(word)}" for word in node.children]
        lines += [f"{here} {_fish_option(option)}" for option in node.options]
    return "\n".join(lines) + "\n"


def _fish_option(option: Action) -> str:
    names = [f"-l {text[2:]}" if text.startswith("--") else f"-s {text[1:]}" for text in option.option_strings]
    if option.nargs == 0:
        return " ".join(names)
    if option.choices:
        return " ".join([*names, "-x -a", _quoted(" ".join(str(choice) for choice in option.choices))])
    return " ".join([*names, "-r -F" if takes_file(option) else "-x"])


def _paths(nodes: Sequence[Node]) -> str:
    return "|".join(f'"{node.path}"' for node in nodes if node.path)


def _words(nodes: Sequence[Node], action: str) -> str:
    return "\n".join(f'        "{node.path}") {action.format(" ".join(node.words()))} ;;' for node in nodes)


def _cases(nodes: Sequence[Node], for_files: str, for_choices: str) -> str:
    files, choices = values(nodes)
    lines = [f"        {'|'.join(files)}) {for_files} ;;"] if files else []
    return "\n".join([*lines, *(f"        {text}) {for_choices.format(words)} ;;" for text, words in choices.items())])


def _quoted(text: str) -> str:
    return f"'{text}'"


SCRIPTS: dict[str, Callable[[Sequence[Node]], str]] = {"bash": bash, "fish": fish, "zsh": zsh}
