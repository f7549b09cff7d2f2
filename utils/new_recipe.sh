#!/usr/bin/env bash
# Make egs2/NAME/ssl1, a recipe for a new corpus: the mini recipe's settings and a local/data.sh to be written.
set -euo pipefail

help_message="usage: utils/new_recipe.sh NAME

Makes egs2/NAME/ssl1 from egs2/mini/ssl1: the same run.sh, settings and stages, with --corpus NAME and a
local/data.sh that says what it must write. NAME: letters, digits, _ and -, for example my_corpus."

case ${1:-} in
    -h | --help) echo "${help_message}"; exit 0 ;;
esac
if [ $# -ne 1 ]; then
    echo "${help_message}" >&2
    exit 2
fi
name=$1
if ! [[ ${name} =~ ^[A-Za-z0-9][A-Za-z0-9_-]*$ ]]; then
    echo "error: recipe name '${name}': use letters, digits, _ and -, beginning with a letter or digit" >&2
    exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
model=${root}/egs2/mini/ssl1
new=${root}/egs2/${name}
if [ -e "${new}" ]; then
    echo "error: egs2/${name} exists; choose another name or remove it" >&2
    exit 2
fi
if ! grep -q '^ *--corpus mini$' "${model}/run.sh"; then
    echo "error: ${model}/run.sh has no line '--corpus mini'; restore it" >&2
    exit 2
fi

# Built beside its place and renamed: an interrupted run leaves no half recipe.
building=$(mktemp -d "${root}/egs2/.${name}.XXXXXX")
trap 'rm -rf "${building}"' EXIT
chmod 755 "${building}"
mkdir -p "${building}/ssl1/local"
# Settings are copied, what the recipe has made (data, dump, exp) is not; links stay links.
for part in run.sh path.sh cmd.sh conf; do
    if [ -e "${model}/${part}" ] || [ -L "${model}/${part}" ]; then
        cp -RP "${model}/${part}" "${building}/ssl1/${part}"
    fi
done
sed -e "s/^\( *--corpus\) mini\$/\1 ${name}/" \
    -e "2s/^# .*/# ${name}: made by utils\/new_recipe.sh from egs2\/mini\/ssl1; local\/data.sh brings the corpus./" \
    "${model}/run.sh" > "${building}/ssl1/run.sh"
chmod 755 "${building}/ssl1/run.sh"
cp "${root}/utils/recipe_skeleton/local/data.sh" "${building}/ssl1/local/data.sh"
mv "${building}" "${new}"

cat <<EOF
made egs2/${name}/ssl1
next: edit egs2/${name}/ssl1/local/data.sh (its head says what it must write), then
  egs2/${name}/ssl1/run.sh --stage data --stop_stage check
or, for a Kaldi-style folder {train,dev,test}/{wav.scp,text,utt2spk}, without editing:
  egs2/${name}/ssl1/run.sh --stage data --stop_stage check --corpus_dir /path/to/folder
EOF
