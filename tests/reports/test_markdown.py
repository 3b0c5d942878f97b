"""Our own Markdown as HTML."""

from evaluation.formats import markdown_table
from reports.markdown import to_html


def test_headings_lists_and_paragraphs():
    html = to_html("# Title\n\n- one\n- two\n\n## Part\n\nA line\nand another", level=2)
    assert html == (
        '<h2>Title</h2>\n<ul class="fine"><li>one</li><li>two</li></ul>\n<h3>Part</h3>\n<p>A line<br>and another</p>'
    )


def test_tables_with_intervals_sides_and_bars():
    html = to_html("\n".join(markdown_table(["model", "mIoU"], [["a|b", "1.00 [0.50, 2.00] *"]], left=1)))
    assert '<thead><tr><th class="left">model</th><th>mIoU</th></tr></thead>' in html
    assert '<th class="left">a|b</th>' in html
    assert '<td>1.00<small class="interval">[0.50, 2.00] *</small></td>' in html


def test_what_could_be_markup_is_text():
    html = to_html("## <b>\n\n- <i>\n\n| a |\n| --- |\n| <script> |\n\n<p>")
    assert "&lt;b&gt;" in html and "&lt;script&gt;" in html and "&lt;i&gt;" in html
    assert "<script>" not in html and "<b>" not in html and "<p>&lt;p&gt;</p>" in html
