"""A hook of mkdocs: pages show pictures of benchmarks/ by the paths that they have in the repository."""

from pathlib import Path

from mkdocs.structure.files import File


def on_files(files, config):
    root = Path(config.config_file_path).parent
    for picture in sorted(root.glob("benchmarks/**/results/**/*.png")):
        name = picture.relative_to(root).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    return markdown.replace("](../benchmarks/", "](benchmarks/")
