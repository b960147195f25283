# fish completion for runctl. Written by: runctl completion fish
function __runctl_completion
    set -l tokens (commandline -xpc 2>/dev/null; or commandline -opc)
    set -l current (commandline -ct)
    set -l program (string replace -r '^~' $HOME -- $tokens[1])
    type -q -- $program; or set program runctl
    # fish itself chooses what fits the word; runctl has to know whether it is an option.
    set -l word ''
    string match -q -- '-*' $current; and set word $current
    for line in (env _RUNCTL_COMPLETE=fish_complete $program $tokens[2..] "$word" 2>/dev/null </dev/null)
        set -l fields (string split \t -- $line)
        switch $fields[1]
            case plain
                string join \t -- $fields[2..]
            case file
                __fish_complete_path $current
            case command
                __fish_complete_command
        end
    end
end
complete --command runctl --no-files --keep-order --arguments '(__runctl_completion)'
