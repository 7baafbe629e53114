"""Scripts with which bash, zsh and fish complete `hbpo`: commands, flags, settings, and the values of both.

All of it is written into the script, so that a completion starts no Python.
"""

from collections.abc import Iterator
import shlex

from hbpo_jax import commands, config, flags, validation
from hbpo_jax.commands import Command, Option

SHELLS = ("bash", "zsh", "fish")
HOW_TO = (
    "For this shell and all later ones, add to",
    "  ~/.bashrc                    eval \"$(hbpo completion bash)\"",
    "  ~/.zshrc, behind compinit    eval \"$(hbpo completion zsh)\"",
    "  ~/.config/fish/config.fish   hbpo completion fish | source",
)


def script(shell: str) -> str:
  """The script of one of SHELLS."""
  return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def choices() -> dict[str, tuple[str, ...]]:
  """The values of each setting that has a known few, by its dotted name."""
  found = {}
  for name, field in config.field_table().items():
    if field.type is bool:
      found[name] = ("true", "false")
    elif name in validation.CHOICES:
      found[name] = tuple(map(str, validation.CHOICES[name]))
  return found


def _options(command: Command) -> list[Option]:
  return [*command.options, *(commands.COMMON if command.settings else ()), *([
      Option("help", "", "Show help."), Option("helpfull", "", "Show every setting.")] if command.settings else [
      Option("help", "", "Show help.")])]


def _values() -> dict[str, str | tuple[str, ...]]:
  """What completes the value of each flag, with its dashes: 'directory', 'file', 'config' or texts."""
  found = {f"--{o.name}": o.values for c in commands.COMMANDS.values() for o in _options(c) if o.values}
  return found | {f"--config.{name}": texts for name, texts in choices().items()}


def _bash() -> str:
  rows = {name: " ".join(f"--{o.name}{'=' * bool(o.metavar)}" for o in _options(command))
          for name, command in commands.COMMANDS.items()}
  own = "\n".join(f"    {name}) echo {shlex.quote(row)} ;;" for name, row in rows.items())
  with_settings = "|".join(name for name, command in commands.COMMANDS.items() if command.settings)
  return _BASH.format(
      commands=" ".join([*commands.COMMANDS, "completion"]), own=own, with_settings=with_settings,
      fields=" ".join(f"--config.{name}=" for name in config.field_table()), configs=" ".join(flags.config_names()),
      shells=" ".join(SHELLS), values=_cases("    {flag}) echo {texts} ;;"), files=_names("file"),
      directories=_names("directory"))


def _zsh() -> str:
  quote = lambda text: shlex.quote(text.replace(":", r"\:"))
  described = [f"{name}:{c.summary.rstrip('.')}" for name, c in commands.COMMANDS.items()]
  own = "\n".join(
      f"    {name}) flags=({' '.join('--' + o.name + '=' * bool(o.metavar) for o in _options(c))}) ;;"
      for name, c in commands.COMMANDS.items())
  return _ZSH.format(
      commands="\n    ".join(shlex.quote(text) for text in [*described, "completion:Print a script for the shell"]),
      own=own, with_settings="|".join(n for n, c in commands.COMMANDS.items() if c.settings),
      fields=" ".join(f"--config.{name}=" for name in config.field_table()),
      configs=" ".join(map(quote, flags.config_names())), shells=" ".join(SHELLS),
      values=_cases("    {flag}) compadd -- {plain} ;;"), files=_names("file"), directories=_names("directory"))


def _fish() -> str:
  return "".join(f"{line}\n" for line in _fish_lines())


def _fish_lines() -> Iterator[str]:
  quote = lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
  first = "__fish_is_nth_token 1"
  yield "complete -c hbpo -e"
  yield "complete -c hbpo -f"
  for name, command in commands.COMMANDS.items():
    yield f"complete -c hbpo -n '{first}' -a {name} -d {quote(command.summary)}"
  yield f"complete -c hbpo -n '{first}' -a completion -d 'Print a script for the shell.'"
  yield f"complete -c hbpo -n '{first}' -l help -d 'List the commands.'"
  yield f"complete -c hbpo -n '{first}' -l version -d 'Print the version.'"
  yield f"complete -c hbpo -n '__fish_seen_subcommand_from completion' -a '{' '.join(SHELLS)}'"
  values = {
      "directory": "-xa '(__fish_complete_directories)'", "file": "-rF",
      "config": f"-rF -a '{' '.join(flags.config_names())}'"}
  for name, command in commands.COMMANDS.items():
    for o in _options(command):
      takes = "-x" if o.metavar else ""
      if o.values:
        takes = values[o.values] if isinstance(o.values, str) else f"-x -a '{' '.join(o.values)}'"
      yield f"complete -c hbpo -n '__fish_seen_subcommand_from {name}' -l {o.name} {takes} -d {quote(o.help)}"
    if command.arguments:
      yield f"complete -c hbpo -n '__fish_seen_subcommand_from {name}' -a '(__fish_complete_directories)'"
  known = choices()
  everywhere = " ".join(name for name, command in commands.COMMANDS.items() if command.settings)
  for name, field in config.field_table().items():
    texts = f" -a '{' '.join(known[name])}'" if name in known else ""
    yield (f"complete -c hbpo -n '__fish_seen_subcommand_from {everywhere}' -l config.{name} -x{texts} -d "
           f"{quote(field.metadata['help'])}")


def _cases(line: str) -> str:
  """A line of a shell's `case` for each flag whose values are a list of texts."""
  return "\n".join(
      line.format(flag=flag, texts=shlex.quote(" ".join(texts)), plain=" ".join(map(shlex.quote, texts)))
      for flag, texts in _values().items() if isinstance(texts, tuple))


def _names(what: str) -> str:
  return "|".join(flag for flag, kind in _values().items() if kind == what)


_BASH = """\
# bash completion of hbpo, made by: hbpo completion bash

_hbpo_flags() {{
  case $1 in
{own}
  esac
}}

_hbpo_values() {{
  case $1 in
{values}
  esac
}}

_hbpo_paths() {{  # -f or -d, what is there already, what precedes the path in the word
  local IFS=$'\\n'
  compopt -o filenames 2>/dev/null
  COMPREPLY=($(compgen "$1" -P "$3" -- "$2"))
}}

_hbpo() {{
  local IFS=$' \\t\\n' line=${{COMP_LINE:0:COMP_POINT}} words word name='' text kept='' candidates=''
  read -ra words <<<"$line"
  word=${{line##*[[:blank:]]}}
  [[ -n $word ]] || words+=('')
  COMPREPLY=()
  # A flag's value, behind = or as the next word. Where readline breaks words at =, it wants what follows only.
  text=$word
  if [[ $word = --*=* ]]; then
    name=${{word%%=*}} text=${{word#*=}}
    [[ $COMP_WORDBREAKS = *=* ]] || kept=$name=
  elif ((${{#words[@]}} > 2)); then
    case ${{words[${{#words[@]}}-2]}} in
      --config|{files}|{directories}) [[ $word = -* ]] || name=${{words[${{#words[@]}}-2]}} ;;
    esac
  fi
  case $name in
    '') ;;
    --config)
      compopt -o filenames 2>/dev/null
      candidates="{configs} $(IFS=$'\\n'; compgen -d -- "$text"; compgen -f -X '!*.py' -- "$text")" ;;
    {files}) _hbpo_paths -f "$text" "$kept"; return ;;
    {directories}) _hbpo_paths -d "$text" "$kept"; return ;;
    *) candidates=$(_hbpo_values "$name") ;;
  esac
  if [[ -n $name ]]; then
    COMPREPLY=($(compgen -P "$kept" -W "$candidates" -- "$text"))
    return
  fi
  if ((${{#words[@]}} <= 2)); then
    candidates='{commands} --help --version'
  elif [[ ${{words[1]}} = completion ]]; then
    candidates='{shells}'
  elif [[ $word = -* ]]; then
    candidates=$(_hbpo_flags "${{words[1]}}")
    case ${{words[1]}} in {with_settings}) [[ $word != --config* ]] || candidates+=' {fields}' ;; esac
    compopt -o nospace 2>/dev/null
  else
    _hbpo_paths -d "$word" ''
    return
  fi
  COMPREPLY=($(compgen -W "$candidates" -- "$word"))
}}

complete -F _hbpo hbpo
"""

_ZSH = """\
#compdef hbpo
# zsh completion of hbpo, made by: hbpo completion zsh

_hbpo() {{
  local -a commands flags
  local name=''
  commands=(
    {commands}
  )
  if ((CURRENT == 2)); then
    if [[ $words[2] = -* ]]; then compadd -- --help --version; else _describe command commands; fi
    return
  fi
  if [[ $words[CURRENT] = --*=* ]]; then
    name=${{words[CURRENT]%%=*}}
    compset -P '*='
  elif [[ $words[CURRENT-1] = --(config|workdir|gin_file|out) && $words[CURRENT] != -* ]]; then
    name=$words[CURRENT-1]
  fi
  case $name in
    '') ;;
    --config) compadd -- {configs}; _files -g '*.py'; return ;;
    {files}) _files; return ;;
    {directories}) _files -/; return ;;
{values}
  esac
  [[ -z $name ]] || return
  if [[ $words[2] = completion ]]; then compadd -- {shells}; return; fi
  if [[ $words[CURRENT] != -* ]]; then _files -/; return; fi
  case $words[2] in
{own}
  esac
  case $words[2] in {with_settings}) [[ $words[CURRENT] != --config* ]] || flags+=({fields}) ;; esac
  compadd -S '' -- $flags
}}

# In a file of fpath this is the function itself; read by eval, it still has to be made known.
if [[ $funcstack[1] = _hbpo ]]; then _hbpo "$@"; else compdef _hbpo hbpo; fi
"""
