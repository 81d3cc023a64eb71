"""Write `examples/notes-es`: short clinical notes in Spanish, each with the record that belongs into a form.

    python -m examples.notes_es

A note is put together from parts by a seeded draw: the same files every time. The complaints of the held-out notes
occur in no training note, so that whoever fills the form right has read the note.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "notes-es"
SEED = 20_240_601
TRAIN, HELDOUT = 400, 40
INSTRUCTION = "Rellena la ficha: "

TRAIN_COMPLAINTS = (
    "fiebre alta", "dolor de cabeza", "tos seca", "náuseas", "dolor de espalda", "mareo", "vómitos",
    "picor en los ojos", "dolor de rodilla", "cansancio", "diarrea", "dolor de garganta", "palpitaciones",
    "visión borrosa", "insomnio", "sangrado nasal", "dolor en el pecho", "hinchazón del tobillo",
    "pérdida de apetito", "ronquera", "acidez", "dolor de muelas", "temblor de manos", "calambres nocturnos",
    "manchas en la piel", "zumbido de oídos", "escozor al orinar", "estreñimiento", "sudores nocturnos",
    "dolor de cadera",
)  # fmt: skip
HELDOUT_COMPLAINTS = (
    "dolor de oído", "tos con flemas", "picor en la piel", "dolor abdominal", "hinchazón de la mano", "fiebre leve",
    "dolor de hombro", "debilidad en las piernas", "hormigueo en los dedos", "falta de aire",
)  # fmt: skip
UNITS = (("hora", "horas", 23), ("día", "días", 13), ("semana", "semanas", 7), ("mes", "meses", 11))
FORMS = (
    "{sex} de {age} años con {complaint} desde hace {duration}.",
    "Acude por {complaint} de {duration} de evolución. {sex}, {age} años.",
    "{sex} de {age} años. Refiere {complaint} desde hace {duration}.",
    "{complaint_capital} desde hace {duration}. Paciente: {sex_small} de {age} años.",
)


@dataclass(frozen=True)
class Note:
    """What a note tells of its patient."""

    sex: str
    age: int
    complaint: str
    duration: str

    def text(self, form: str) -> str:
        """The note as it was jotted down."""
        return form.format(
            sex=self.sex.capitalize(),
            sex_small=self.sex,
            age=self.age,
            complaint=self.complaint,
            complaint_capital=self.complaint[0].upper() + self.complaint[1:],
            duration=self.duration,
        )

    def record(self) -> str:
        """The form, filled in: one line of JSON with its keys in order."""
        form = {"sexo": self.sex, "edad": self.age, "motivo": self.complaint, "duración": self.duration}
        return json.dumps(form, ensure_ascii=False)


def draw(complaints: tuple[str, ...], count: int, generator: random.Random) -> list[str]:
    """`count` different chats, a line of JSON each."""
    lines: dict[str, None] = {}
    while len(lines) < count:
        one, many, most = generator.choice(UNITS)
        number = generator.randint(1, most)
        note = Note(
            sex=generator.choice(("hombre", "mujer")),
            age=generator.randint(18, 95),
            complaint=generator.choice(complaints),
            duration=f"{number} {one if number == 1 else many}",
        )
        question = INSTRUCTION + note.text(generator.choice(FORMS))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": note.record()}]
        lines[json.dumps({"messages": messages}, ensure_ascii=False)] = None
    return list(lines)


def write(folder: Path) -> None:
    """Write both files into a folder that exists."""
    generator = random.Random(SEED)
    for name, complaints, count in (("train", TRAIN_COMPLAINTS, TRAIN), ("heldout", HELDOUT_COMPLAINTS, HELDOUT)):
        text = "".join(line + "\n" for line in draw(complaints, count, generator))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER)
