"""Workbooks as Excel writes them, with shared texts, made of XML by hand, so that they may say what they like."""

from __future__ import annotations

import io
import zipfile

MAIN = b"http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATIONS = b"http://schemas.openxmlformats.org/officeDocument/2006/relationships"
OF_PACKAGE = b"http://schemas.openxmlformats.org/package/2006"
OF_SHEETS = b"application/vnd.openxmlformats-officedocument.spreadsheetml."
HEAD = b'<row r="1"><c r="A1" t="s"><v>0</v></c><c r="B1" t="s"><v>1</v></c></row>'
TEXTS = b"<si><t>id</t></si><si><t>prompt</t></si><si><t>a fox</t></si>"
"""Numbers 0, 1 and 2."""
FOX = b'<row r="2"><c r="A2"><v>1</v></c><c r="B2" t="s"><v>2</v></c></row>'


def workbook(rows: bytes = FOX, *, head: bytes = HEAD, texts: bytes = TEXTS, doctype: bytes = b"") -> bytes:
    """A workbook of one sheet.

    Args:
        rows: What follows the head in its `sheetData`.
        head: The row of the columns' names.
        texts: What the table of shared texts holds.
        doctype: Stands before that table.
    """
    relation = b'<Relationship Id="%s" Type="' + RELATIONS + b'/%s" Target="%s"/>'
    relations = b'<Relationships xmlns="' + OF_PACKAGE + b'/relationships">%s</Relationships>'
    kind = b'<Override PartName="/xl/%s" ContentType="' + OF_SHEETS + b'%s+xml"/>'
    kinds = (
        kind % (b"workbook.xml", b"sheet.main")
        + kind % (b"sheet.xml", b"worksheet")
        + kind % (b"texts.xml", b"sharedStrings")
    )
    parts = {
        "[Content_Types].xml": b'<Types xmlns="%s/content-types">%s</Types>' % (OF_PACKAGE, kinds),
        "_rels/.rels": relations % (relation % (b"r1", b"officeDocument", b"xl/workbook.xml")),
        "xl/_rels/workbook.xml.rels": relations
        % (relation % (b"r1", b"worksheet", b"sheet.xml") + relation % (b"r2", b"sharedStrings", b"texts.xml")),
        "xl/workbook.xml": b'<workbook xmlns="%s" xmlns:r="%s"><sheets><sheet name="s" sheetId="1" r:id="r1"/></sheets>'
        b"</workbook>" % (MAIN, RELATIONS),
        "xl/sheet.xml": b'<worksheet xmlns="%s"><sheetData>%s%s</sheetData></worksheet>' % (MAIN, head, rows),
        "xl/texts.xml": b'%s<sst xmlns="%s">%s</sst>' % (doctype, MAIN, texts),
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()
