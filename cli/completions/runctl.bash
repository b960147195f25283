# bash completion for runctl. Written by: runctl completion bash
_runctl_completion() {
    local program=${1/#\~/$HOME} kind value _
    type -P -- "$program" > /dev/null || program=runctl  # completed by another name
    COMPREPLY=()
    # runctl takes the line itself, since bash has cut its words at colons, and answers
    # with what is to stand where bash replaces, quoted to fit.
    while IFS=$'\t' read -r kind value _; do
        case $kind in
            plain) COMPREPLY+=("$value") ;;
            file) compopt -o default 2> /dev/null ;;
            command)
                while IFS= read -r value; do
                    COMPREPLY+=("$value")
                done < <(compgen -c -- "${COMP_WORDS[COMP_CWORD]}" | sort -u)
                compopt -o default 2> /dev/null
                ;;
        esac
    done < <(
        _RUNCTL_COMPLETE=bash_complete RUNCTL_WORDBREAKS=$COMP_WORDBREAKS \
            "$program" "${COMP_LINE:0:COMP_POINT}" 2> /dev/null < /dev/null
    )
}
complete -o nosort -F _runctl_completion runctl 2> /dev/null ||
    complete -F _runctl_completion runctl
