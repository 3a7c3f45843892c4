"""How a folder's own chat template writes a conversation, cut into the pieces of a tokenizer.Format.

A chat template is a program of jinja that turns messages into text. `cut_template` runs it on a few
conversations whose contents are unlikely words, and cuts what comes out at these words:

    start               what begins every conversation
    opening, closing    of a role: what stands before and after what is said
    no_system           what the template writes in place of a system turn where there is none
    system_in_user      there is no system role: the instruction goes in front of the user's text

A template that cannot be cut so (it changes what is said, drops or doubles a turn) is refused. It runs in a
process of its own: jinja's sandbox keeps it from files, but not from endless loops.
"""
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path

from support.files import BadInput, read_json, read_text

S, U, A, U2, A2 = "Qsystemq", "Quserq", "Qassistantq", "Qmoreq", "Qlastq"  # what no template writes
MAX_TEMPLATE = 1 << 20  # the longest known has 20,000 characters
MAX_SECONDS, MAX_MEMORY = 5, 1 << 30  # of the process that runs one; bytes


@dataclass
class Pieces:
    """A conversation is start, then (or no_system in place of the first turn) opening[role], what is said,
    closing[role] of every turn."""
    start: str
    opening: dict[str, str] = field(default_factory=dict)
    closing: dict[str, str] = field(default_factory=dict)
    no_system: str = ""
    system_in_user: bool = False

    def write(self, text: str, code: str) -> str:
        """A conversation without a system turn."""
        return (self.start + self.no_system + self.opening["user"] + text + self.closing["user"]
                + self.opening["assistant"] + code + self.closing["assistant"])


def read_template(folder: Path) -> tuple[str, dict[str, str]]:
    """The chat template of a folder, empty if it has none, and the special tokens that it may name."""
    path, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings = read_json(path) if path.exists() else {}
    if (folder / "special_tokens_map.json").exists():
        settings = read_json(folder / "special_tokens_map.json") | settings
    tokens = {name: token.get("content") if isinstance(token, dict) else token
              for name, token in settings.items() if name.endswith("_token")}
    template = read_text(own, MAX_TEMPLATE) if own.exists() else settings.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else ""
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise BadInput(f"its chat template is no text of at most {MAX_TEMPLATE:,} characters")
    return template, {name: token for name, token in tokens.items() if isinstance(token, str)}


def renderer(template: str, tokens: dict[str, str]):
    """A function (role, said), ... -> text, which runs the template in jinja's sandbox. BadInput if jinja is
    not installed or the template fails. Its clock stands still, or a run would depend on its day."""
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise BadInput("a chat template needs jinja2: pip install -r requirements-hf.txt") from None

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, around an answer, writes nothing."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True),
                                      lineno=line)

    def refuse(message):
        raise jinja2.TemplateError(message)

    world = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    world.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    world.globals |= {"raise_exception": refuse, "strftime_now": datetime(2024, 7, 26).strftime}

    def render(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": said} for role, said in turns]
        try:
            return world.from_string(template).render(
                messages=messages, add_generation_prompt=False, **tokens)
        except Exception as error:  # of whatever kind the template provokes
            what = str(error).partition("\n")[0]
            raise BadInput(f"its chat template fails ({type(error).__name__}: {what})") from None
    return render


def cut(text: str, *said: str) -> list[str]:
    """What stands around these words; BadInput unless each is there once, in this order."""
    parts = []
    for word in said:
        before, _, after = text.partition(word)
        if text.count(word) != 1:
            raise BadInput("its chat template drops, doubles or changes a turn")
        parts, text = [*parts, before], after
    return [*parts, text]


def common_suffix(a: str, b: str) -> str:
    return commonprefix([a[::-1], b[::-1]])[::-1]


def cut_template(folder: Path) -> Pieces | None:
    """The pieces of a folder's template; None if it has none. BadInput says why it cannot be cut."""
    template, tokens = read_template(folder)
    return pieces_of(json.dumps([template, tokens])) if template else None


@lru_cache(maxsize=4)
def pieces_of(template_and_tokens: str) -> Pieces:
    """`cut_up` in a process of its own. BadInput also where it takes too long or too much memory."""
    program = [sys.executable, "-X", "utf8", "-c", "from support.chat import main; main()"]
    try:
        answer = subprocess.run(program, input=template_and_tokens, capture_output=True, encoding="utf-8",
                                timeout=MAX_SECONDS, cwd=Path(__file__).parent.parent).stdout
    except subprocess.TimeoutExpired:
        raise BadInput(f"its chat template runs for more than {MAX_SECONDS} seconds") from None
    if not answer.startswith("{"):
        raise BadInput(answer or "its chat template fails (the process that runs it has died)")
    return Pieces(**json.loads(answer))


def main() -> None:
    """The process that runs a template: its standard input is cut up, as JSON or as why not."""
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    except ImportError:  # Windows
        pass
    try:
        answer = json.dumps(asdict(cut_up(*json.load(sys.stdin))))
    except BadInput as error:
        answer = str(error)
    print(answer, end="")


def cut_up(template: str, tokens: dict[str, str]) -> Pieces:
    """The pieces of a template. BadInput says why it cannot be cut."""
    render = renderer(template, tokens)
    user, assistant = ("user", U), ("assistant", A)
    before, between, after = cut(render(user, assistant), U, A)
    again, _, asked = render(user).partition(U)
    if not between.startswith(asked):  # some end every text with eos
        asked = asked.removesuffix(tokens.get("eos_token") or "")
    if again != before or not between.startswith(asked):
        raise BadInput("its chat template writes a turn differently where an answer follows it")
    # the start is what a first turn has in front of it and a later one has not
    more = cut(render(user, assistant, ("user", U2), ("assistant", A2)), U, A, U2, A2)
    opening = common_suffix(before, more[2].removeprefix(more[4]))
    start = before.removesuffix(opening)
    bos = tokens.get("bos_token") or ""
    if bos and between.removeprefix(asked).startswith(bos):
        bos = ""  # it begins every turn, as SmolLM2's <|im_start|>, and not the conversation
    if bos and not start and opening.startswith(bos):
        start, opening = bos, opening.removeprefix(bos)
    pieces = Pieces(start, {"user": opening, "assistant": between.removeprefix(asked)},
                    {"user": asked, "assistant": after})
    try:
        instructed = render(("system", S), user, assistant)
    except BadInput:  # it has no system role and says so
        instructed = render(("user", f"{S}\n\n{U}"), assistant)
    if instructed == render(("user", f"{S}\n\n{U}"), assistant):
        pieces.system_in_user = True
        return pieces
    ahead, behind, *_ = cut(instructed, S, U)
    if not ahead.startswith(start):  # where no instruction is given, the template has one of its own
        pieces.start = bos if bos and ahead.startswith(bos) and start.startswith(bos) else ""
        pieces.no_system = start.removeprefix(pieces.start)
    if not behind.endswith(opening):
        raise BadInput("its chat template writes a user's turn differently after an instruction")
    pieces.opening["system"] = ahead.removeprefix(pieces.start)
    pieces.closing["system"] = behind.removesuffix(opening)
    return pieces
